"""`audit` with data: the effect, which way it points, and nothing changed.

Models that were trained on the digits, rightly and in each wrong way.
"""

import json
import random

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.diagnostics.batches import Batch
from keras_bn.diagnostics.scores import Comparison
from tests.keras_bn import frameworks
from tests.keras_bn.diagnostics import digits

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization
LAYERS = pytest.mark.parametrize("layer", [OURS, KERAS], ids=["ours", "keras"])

RECALIBRATE = "keras_bn.recalibrate(model, data)"
ASK = "keras_bn.audit(model, data, labels)"
ASK_MORE = "keras_bn.audit(model, more_data, more_labels)"
TRAIN_AGAIN = "model(inputs, training=True)"


def _audited(model, data=None, labels=None, **kwargs):
    if data is None:
        data, labels = digits.unseen()
    return keras_bn.audit(model, data, labels, verbose=0, **kwargs)


def _remedies(report):
    return {one.remedy for one in report.findings}


def _accuracy(model, values, labels, training=False):
    found = frameworks.array(model(values, training=training)).argmax(-1)
    return np.mean(found == labels)


def _dropped(layer=OURS):
    """Updates of the statistics were dropped: forms (a) and (b)."""
    model = digits.trained(layer)
    keras_bn.reset_statistics(model)
    return model


def _in_inference():
    """Trained without training=True: forms (c) and (d)."""
    return digits.trained(inference=True)


def _too_few_steps():
    """Form (e)."""
    model = digits.trained(momentum=0.99)
    model.compile("sgd", "mse")
    model.optimizer.iterations.assign(40)
    for layer in (model.get_layer("first"), model.get_layer("second")):
        for variable, initial in (
            (layer.moving_mean, 0.0),
            (layer.moving_variance, 1.0),
        ):
            there = frameworks.array(variable)
            variable.assign(there + 0.99**40 * (initial - there))
    return model


def _other_data():
    """Form (f): the digits are paler, on a ground that is not black."""
    values, labels = digits.unseen()
    return digits.trained(), 100.0 + 0.2 * values, labels


def _frozen_and_adapted():
    """Statistics that are not the data's, on purpose; the weights adapted."""
    model = _in_inference()
    for layer in keras_bn.freeze(model):
        layer.moving_mean.assign(layer.moving_mean + 0.01)
    return model


@LAYERS
def test_a_model_that_was_trained_right_is_healthy(layer):
    model = digits.trained(layer)
    values, labels = digits.unseen()
    report = _audited(model, values, labels)
    assert (report.status, report.ok, report.findings) == ("healthy", True, [])
    assert report.samples == len(values)
    right = _accuracy(model, values, labels)
    assert report.scores.name == "accuracy"
    assert report.scores.in_inference == pytest.approx(right)
    assert [x.layer for x in report.layers] == ["first", "second"]


@LAYERS
def test_dropped_updates(layer):
    report = _audited(_dropped(layer))
    assert report.status == "findings"
    assert _remedies(report) == {RECALIBRATE}
    gap, lost, *others = report.findings
    assert gap.layer is None and gap.measured == report.output_gap
    assert lost.layer is None and lost.what.startswith("accuracy lost")
    assert lost.measured > lost.threshold
    assert {one.layer for one in others} == {"first", "second"}


def test_training_in_inference_mode():
    report = _audited(_in_inference())
    assert all(x.startswith(TRAIN_AGAIN) for x in _remedies(report))
    assert report.scores.in_inference > report.scores.with_batch + 0.1


def test_too_few_steps_for_the_momentum():
    report = _audited(_too_few_steps())
    assert _remedies(report) == {RECALIBRATE}
    found = [x for x in report.findings if "initial values" in x.what]
    assert found[0].measured == pytest.approx(0.99**40)


def test_other_data():
    model, values, labels = _other_data()
    report = _audited(model, values, labels)
    assert _remedies(report) == {RECALIBRATE}
    keras_bn.recalibrate(model, values, verbose=0)
    assert _audited(model, values, labels).ok


@pytest.mark.parametrize(
    "sick", [_dropped, _in_inference], ids=["dropped", "in inference"]
)
def test_without_labels_neither_is_prescribed(sick):
    values, _ = digits.unseen()
    report = _audited(sick(), values)
    assert not report.ok and report.scores is None
    assert _remedies(report) == {ASK}
    assert all("Either" in one.cause for one in report.findings)


def test_frozen_on_purpose():
    model = _frozen_and_adapted()
    values, labels = digits.unseen()
    for given in (labels, None):
        report = _audited(model, values, given)
        assert report.status == "healthy", report
    # The modes do differ; it is the freezing that excuses it.
    assert report.output_gap > 0.7


class InInference(keras.Model):
    """Freezes a model as one that is written by hand may."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def call(self, inputs, training=None):
        return self.base(inputs, training=False)


def test_called_for_inference_within_the_model():
    values, labels = digits.unseen()
    base = _frozen_and_adapted()
    keras_bn.thaw(base)
    model = InInference(base)
    model(values[:1])
    assert _audited(model, values, labels).ok
    assert not _audited(base, values, labels).ok


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_do_not_tell(seed):
    """By chance one of the modes does better, and that names no remedy."""
    values, labels = digits.unseen()
    labels = np.random.default_rng(seed).permutation(labels)
    report = _audited(_dropped(), values, labels)
    assert abs(report.scores.lost_with_batch) < report.scores.threshold
    assert _remedies(report) == {ASK_MORE}
    assert "More labels" in report.findings[0].cause


@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_small_batches_accuse_nobody(batch_size):
    values, labels = digits.unseen()
    report = _audited(digits.trained(), values, labels, batch_size=batch_size)
    assert report.ok


def test_sorted_data_accuses_nobody():
    values, labels = digits.unseen()
    order = np.argsort(labels, kind="stable")
    pairs = [
        (values[order[i : i + 32]], labels[order[i : i + 32]])
        for i in range(0, len(order), 32)
    ]
    report = _audited(digits.trained(), iter_of(pairs))
    assert report.scores.with_batch < report.scores.in_inference - 0.3
    assert report.ok, report
    # Arrays are read in another order.
    report = _audited(digits.trained(), values[order], labels[order])
    assert report.scores.with_batch > report.scores.in_inference - 0.1


@pytest.mark.parametrize("off_by", [0.4, 0.6])
def test_many_layers_that_are_off_by_a_little(off_by):
    """Outputs of inference shrink from layer to layer; labels tell the loss."""
    model = keras.Sequential([keras.Input((3,))])
    for number in range(8):
        model.add(OURS(name=f"layer_{number}", epsilon=0.0))
    model.add(keras.layers.Dense(2, use_bias=True))
    values = np.random.default_rng(0).standard_normal((512, 3), "float32")
    for layer in model.layers[:8]:
        # Moved, so that they are no initial values.
        layer.gamma.assign([1.001] * 3)
    keras_bn.recalibrate(model, values, batch_size=512, verbose=0)
    for layer in model.layers[:8]:
        layer.moving_variance.assign(layer.moving_variance * np.exp(off_by))
    kernel, bias = [[1.0, -1.0]] + [[0.0, 0.0]] * 2, [-0.5, 0.5]
    model.layers[-1].set_weights([np.array(kernel), np.array(bias)])
    report = _audited(model, values, batch_size=512)
    assert report.output_gap > 0.8
    assert max(x.variance_log_ratio for x in report.layers) == pytest.approx(
        off_by, rel=1e-2
    )
    assert report.ok is (off_by < 0.5)
    labels = frameworks.array(model(values, training=True)).argmax(-1)
    report = _audited(model, values, labels, batch_size=512)
    assert _remedies(report) == {RECALIBRATE}


def iter_of(pairs):
    yield from pairs


def test_the_distances_are_those_of_recalibration():
    model = digits.trained(momentum=0.99)
    values, _ = digits.unseen()
    report = _audited(model, values, batch_size=len(values))
    done = keras_bn.recalibrate(
        model, values, batch_size=len(values), verbose=0
    )
    for one, other in zip(report.layers, done, strict=True):
        assert one.layer == other.layer
        assert one.positions == other.positions
        found = one.mean_distance, one.variance_log_ratio
        right = other.mean_distance, other.variance_log_ratio
        np.testing.assert_allclose(found, right, rtol=1e-4)


def test_the_gap_between_outputs():
    """Held against Keras's own layer, and the formula in float64."""
    values, _ = digits.unseen()
    model = digits.trained(KERAS)
    keras_bn.reset_statistics(model)
    report = _audited(model, values, batch_size=len(values))
    x, y = (
        frameworks.array(model(values, training=training)).astype("float64")
        for training in (False, True)
    )
    variance = (x.var(0).mean() + y.var(0).mean()) / 2
    right = np.sqrt(np.mean(np.square(x - y)) / variance)
    assert report.output_gap == pytest.approx(right, rel=1e-4)


class _Counts(keras.layers.Layer):
    """Counts its calls, in inference too, and adds a loss."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs):
        self.calls.assign(self.calls + 1.0)
        self.add_loss(keras.ops.mean(inputs))
        return inputs


def test_nothing_changes():
    model = digits.cnn(OURS, dropout=0.5)
    model = keras.Sequential([*model.layers[:-1], _Counts(), model.layers[-1]])
    values, labels = (x[:128] for x in digits.images())
    digits.train(model, 3, values, labels)
    model.predict(values[:8], verbose=0)
    functions = [
        getattr(model, f"{name}_function")
        for name in ("train", "test", "predict")
    ]
    variables = [*model.variables, *model.optimizer.variables]
    before = [frameworks.array(v) for v in variables]
    global_seed = _state_of_global_seed()
    draws = random.getstate()[1], np.random.get_state()[1].tolist()
    keras_bn.audit(model, values, labels, verbose=0)
    keras_bn.audit(model)
    for variable, value in zip(variables, before):
        np.testing.assert_array_equal(frameworks.array(variable), value)
    for name, function in zip(("train", "test", "predict"), functions):
        assert getattr(model, f"{name}_function") is function
    assert draws == (random.getstate()[1], np.random.get_state()[1].tolist())
    assert _state_of_global_seed() == global_seed


def _state_of_global_seed():
    generator = keras.src.random.seed_generator.global_seed_generator()
    return frameworks.array(generator.state).tolist()


def test_no_warning_later(recwarn):
    """Of functions that were traced: those of the audit are gone."""
    model = digits.trained()
    _audited(model)
    model.get_layer("first").use_moving_statistics = True
    assert not [x for x in recwarn if "BatchNormalization" in str(x.message)]


def test_a_model_that_was_never_trained():
    report = _audited(digits.cnn())
    assert (report.status, report.ok) == ("not trained", False)
    assert report.findings == []


def test_a_loss_where_there_are_no_classes():
    values, labels = digits.unseen()
    target = (labels[:, np.newaxis] > 4).astype("float32")
    model = digits.trained()
    layers = [*model.layers, keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    with pytest.raises(ValueError, match="Compile the model with its loss"):
        _audited(model, values, target)
    model.compile(loss=keras.losses.MeanSquaredError())
    report = _audited(model, values, target)
    outputs = frameworks.array(model(values))
    assert report.scores.name == "loss"
    right = np.mean(np.square(outputs - target))
    assert report.scores.in_inference == pytest.approx(right, rel=1e-5)
    # Labels that came with the data and cannot be scored are left out.
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    pairs = ((values[:64], {"a": target[:64]}) for _ in range(2))
    assert _audited(model, pairs).scores is None


def test_the_standard_error():
    """That of a mean of pairs, in float64."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(2, 40, 3))
    labels = rng.integers(0, 3, 40)
    comparison = Comparison(None)
    comparison.add(*outputs, Batch(outputs, labels))
    right = outputs.argmax(-1) == labels
    difference = right[1].astype(float) - right[0]
    error = difference.std() / np.sqrt(40)
    assert comparison.standard_error() == pytest.approx(error)
    # A batch that counts ten times tells no more than once.
    many = Comparison(None)
    for _ in range(2):
        repeated = np.repeat(outputs, 10, axis=1)
        many.add(*repeated, Batch(repeated, np.repeat(labels, 10)))
    assert many.standard_error() < error


def test_outputs_that_are_not_finite():
    model = digits.trained()
    model.get_layer("second").moving_variance.assign(np.full(48, np.nan))
    report = _audited(model)
    assert not report.ok
    assert any("not finite" in one.what for one in report.findings)
    assert json.loads(report.to_json())["output_gap"] is None


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"model": keras.layers.Dense(1)}, "found no batch"),
        ({"model": 3}, "Received: model of type int"),
        ({"model": keras.Sequential([OURS()])}, "needs a model that is built"),
        (
            {"model": keras.Sequential(digits.cnn().layers)},
            "needs a model that is built",
        ),
        ({"data": None, "labels": np.zeros(3)}, "Give `data` as well"),
        ({"data": np.zeros((0, 8, 8, 1))}, "`data` is empty"),
        ({"data": 3}, "data of type int"),
        ({"data": np.zeros((4, 8, 8, 2), "float32")}, "shape"),
        ({"data": np.full((4, 8, 8, 1), np.nan)}, "not finite"),
        ({"steps": 9}, "Received: 1 batches, steps=9"),
        ({"data": iter(())}, "data"),
        ({"labels": np.zeros(3)}, "3 labels for 16 samples"),
        ({"labels": np.zeros((16, 4, 2))}, "labels of shape"),
    ],
)
def test_bad_input(wrong, match):
    model = digits.cnn()
    settings = {"model": model, "data": digits.images()[0][:16]} | wrong
    before = model.get_weights()
    with pytest.raises(ValueError, match=match):
        keras_bn.audit(**settings, verbose=0)
    for found, right in zip(model.get_weights(), before):
        np.testing.assert_array_equal(found, right)

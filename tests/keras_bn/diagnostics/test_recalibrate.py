"""`recalibrate`: moving statistics from data, without a training step.

Held against NumPy's float64 moments of what a layer is given; that is found by
running the part of the model below it, built of Keras's own layers.
"""

import math

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization
LAYERS = pytest.mark.parametrize("layer", [OURS, KERAS], ids=["ours", "keras"])

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(3.0, [1.0, 2.0, 3.0], (33, 6, 6, 3)).astype("float32")
CLASSES = RNG.integers(0, 4, 33)


def _model(layer, **kwargs):
    """Two layers of normalization, and dropout between them."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layer(name="first", **kwargs),
            keras.layers.Conv2D(5, 3, activation="relu"),
            keras.layers.Dropout(0.5),
            layer(name="second", **kwargs),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ]
    )


def _recalibrated(model, data=IMAGES, **kwargs):
    settings = {"batch_size": 8, "verbose": 0} | kwargs
    if not isinstance(data, (np.ndarray, dict)):
        del settings["batch_size"]
    return keras_bn.recalibrate(model, data, **settings)


def _statistics(model):
    return {
        x.name: [
            frameworks.array(v) for v in (x.moving_mean, x.moving_variance)
        ]
        for x in model.layers
        if isinstance(x, (OURS, KERAS))
    }


def _moments(values):
    values = np.asarray(values, "float64")
    axes = tuple(range(values.ndim - 1))
    return [values.mean(axes), values.var(axes)]


def _below(model, name, batch, training):
    """What the layer of that name is given for a batch."""
    values = batch
    for layer in model.layers:
        if layer.name == name:
            return frameworks.array(values)
        if isinstance(layer, (OURS, KERAS)) and training:
            mean, variance = _moments(frameworks.array(values))
            gamma, beta, *_ = layer.get_weights()
            values = frameworks.array(values).astype("float64") - mean
            values = values / np.sqrt(variance + layer.epsilon) * gamma + beta
            values = values.astype("float32")
        else:
            values = layer(values, training=False)
    raise KeyError(name)


@LAYERS
def test_moments_of_the_inputs_that_batches_make(layer):
    """The last of the batches has one sample."""
    model = _model(layer)
    done = _recalibrated(model)
    for name, found in _statistics(model).items():
        values = [
            _below(model, name, IMAGES[i : i + 8], training=True)
            for i in range(0, 33, 8)
        ]
        right = _moments(np.concatenate(values))
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)
    assert [one.layer for one in done] == ["first", "second"]
    assert [one.positions for one in done] == [33 * 36, 33 * 16]


@LAYERS
def test_moments_of_the_inputs_that_inference_makes(layer):
    model = _model(layer)
    _recalibrated(model, method="layerwise")
    for name, found in _statistics(model).items():
        right = _moments(_below(model, name, IMAGES, training=False))
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)


@LAYERS
def test_a_mean_of_ten_thousand_deviations(layer):
    values = (RNG.normal(size=(257, 4, 4, 3)) + 1e4).astype("float32")
    model = keras.Sequential([keras.Input((4, 4, 3)), layer(name="only")])
    _recalibrated(model, values, batch_size=64)
    np.testing.assert_allclose(
        _statistics(model)["only"], _moments(values), rtol=1e-5
    )


def test_what_is_reported():
    model = _model(KERAS)
    layer = model.get_layer("first")
    mean, variance = _moments(IMAGES)
    deviation = np.sqrt(variance + layer.epsilon)
    ratio = np.log((1.0 + layer.epsilon) / (variance + layer.epsilon))
    one = _recalibrated(model)[0]
    right = math.sqrt(np.mean(np.square(mean / deviation)))
    assert one.mean_distance == pytest.approx(right, rel=1e-5)
    right = math.sqrt(np.mean(np.square(ratio)))
    assert one.variance_log_ratio == pytest.approx(right, rel=1e-5)
    again = _recalibrated(model)
    assert again[0].mean_distance < 1e-6
    assert "first" in str(again)


@LAYERS
def test_nothing_else_changes(layer):
    model = _model(layer)
    model.compile("adam", "mse")
    model.fit(IMAGES, np.zeros((33, 4)), verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    before = [frameworks.array(v) for v in variables]
    _recalibrated(model)
    changed = {
        v.path.split("/")[-1]
        for v, then in zip(variables, before)
        if not np.array_equal(frameworks.array(v), then)
    }
    assert changed == {"moving_mean", "moving_variance"}


@LAYERS
def test_statistics_of_renormalization(layer):
    model = _model(layer, renorm=True)
    _recalibrated(model)
    one = model.get_layer("second")
    deviation = np.sqrt(frameworks.array(one.moving_variance) + one.epsilon)
    for name, right in (
        ("renorm_mean", frameworks.array(one.moving_mean)),
        ("renorm_stddev", deviation),
        ("moving_stddev", deviation),
    ):
        found = frameworks.array(getattr(one, name))
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)


def test_batches_are_counted_and_the_variance_is_the_layers():
    model = _model(OURS, momentum=None, unbiased_variance=True)
    _recalibrated(model)
    one = model.get_layer("first")
    np.testing.assert_array_equal(frameworks.array(one.num_batches_tracked), 5)
    n = 33 * 36
    right = _moments(IMAGES)[1] * n / (n - 1)
    found = frameworks.array(one.moving_variance)
    np.testing.assert_allclose(found, right, rtol=1e-5)


@LAYERS
def test_masks_dictionaries_and_a_layer_that_is_called_twice(layer):
    a, b = keras.Input((5, 2), name="a"), keras.Input((5, 2), name="b")
    normalize = layer(name="only")
    outputs = [normalize(keras.layers.Masking()(x)) for x in (a, b)]
    model = keras.Model({"a": a, "b": b}, keras.layers.Add()(outputs))
    data = {k: RNG.normal(2.0, 1.0, (9, 5, 2)).astype("float32") for k in "ab"}
    data["a"][:, 3:] = 0.0
    _recalibrated(model, data, batch_size=4)
    kept = np.concatenate([data["a"][:, :3], data["b"]], axis=1)
    np.testing.assert_allclose(
        _statistics(model)["only"], _moments(kept), rtol=1e-5
    )


def test_several_channel_axes_and_channels_without_positions():
    inputs, mask = keras.Input((4, 3)), keras.Input((4, 3), dtype="bool")
    layer = OURS(axis=(1, 2), name="only")
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    values = RNG.normal(2.0, 1.0, (9, 4, 3)).astype("float32")
    keep = np.ones((9, 4, 3), bool)
    keep[:, 1, 2] = False
    _recalibrated(model, [values, keep], batch_size=4)
    mean, variance = values.astype("float64").mean(0), values.var(0, "float64")
    mean[1, 2], variance[1, 2] = 0.0, 1.0
    found = _statistics(model)["only"]
    np.testing.assert_allclose(found[0][0], mean, rtol=1e-5)
    np.testing.assert_allclose(found[1][0], variance, rtol=1e-5)


class _Cell(keras.layers.Layer):
    """Adds up what it is given, normalized."""

    def __init__(self, normalization):
        super().__init__()
        self.normalization = normalization
        self.state_size = self.output_size = 3

    def build(self, shape):
        self.normalization.build(shape)

    def call(self, inputs, states, training=False):
        outputs = self.normalization(inputs, training=training) + states[0]
        return outputs, [outputs]


@LAYERS
def test_a_layer_in_a_recurrent_cell(layer):
    recurrent = keras.layers.RNN(_Cell(layer(name="only")))
    model = keras.Sequential([keras.Input((5, 3)), recurrent])
    values = RNG.normal(2.0, 3.0, (9, 5, 3)).astype("float32")
    done = _recalibrated(model, values, batch_size=4)
    assert done[0].positions == 45
    normalization = recurrent.cell.normalization
    found = [
        frameworks.array(v)
        for v in (normalization.moving_mean, normalization.moving_variance)
    ]
    np.testing.assert_allclose(found, _moments(values), rtol=1e-5)
    assert not recurrent.unroll
    assert keras_bn.audit(model, values, verbose=0).samples == 9


class Loop(keras.Model):
    """Calls a layer in a loop that TensorFlow and JAX compile."""

    def __init__(self):
        super().__init__()
        self.normalization = OURS(name="inside")

    def build(self, shape):
        self.normalization.build(shape)

    def call(self, inputs, training=False):
        def step(_, x):
            return self.normalization(x, training=training)

        return keras.ops.fori_loop(0, 2, step, inputs)


def test_a_layer_in_a_compiled_loop():
    model = Loop()
    model(IMAGES)
    if frameworks.IS_TORCH:
        # Its loops are Python's.
        assert _recalibrated(model)[0].positions == 2 * 33 * 36
        return
    with pytest.raises(ValueError, match="Received: layer 'inside'") as error:
        _recalibrated(model)
    assert "\n" not in str(error.value)


class _Optional(keras.layers.Layer):
    def call(self, a, b=None):
        return a if b is None else a + b


def test_an_input_that_is_left_out():
    a = keras.Input((3,), name="a")
    b = keras.Input((3,), name="b", optional=True)
    outputs = OURS(name="only")(_Optional()(a, b))
    model = keras.Model({"a": a, "b": b}, outputs)
    data = {"a": IMAGES[:, 0, 0], "b": None}
    _recalibrated(model, data)
    right = _moments(IMAGES[:, 0, 0])
    np.testing.assert_allclose(_statistics(model)["only"], right, rtol=1e-5)
    assert keras_bn.audit(model, data, verbose=0).samples == 33


class _Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return IMAGES[8 * i : 8 * i + 8], CLASSES[8 * i : 8 * i + 8]


def _forms_of_data():
    forms = {
        "PyDataset": _Batches,
        "generator": lambda: (_Batches()[i] for i in range(5)),
    }
    if frameworks.IS_TENSORFLOW:
        import tensorflow as tf

        pair = IMAGES, CLASSES
        forms["tf.data"] = lambda: tf.data.Dataset.from_tensor_slices(
            pair
        ).batch(8)
    if frameworks.IS_TORCH:
        import torch

        data = list(zip(IMAGES, CLASSES))
        forms["DataLoader"] = lambda: torch.utils.data.DataLoader(data, 8)
    return forms


@pytest.mark.parametrize("form", _forms_of_data())
def test_data_in_any_form(form):
    model, same = _model(OURS), _model(OURS)
    _recalibrated(model, _forms_of_data()[form](), force=True)
    _recalibrated(same)
    for found, right in zip(model.get_weights(), same.get_weights()):
        np.testing.assert_allclose(found, right, rtol=1e-6)


def test_steps():
    model, same = _model(OURS), _model(OURS)
    _recalibrated(model, steps=2)
    _recalibrated(same, IMAGES[:16])
    for found, right in zip(model.get_weights(), same.get_weights()):
        np.testing.assert_array_equal(found, right)


def _freeze_keras(layer):
    layer.trainable = False


def _freeze_ours(layer):
    layer.update_moving_statistics = False


@pytest.mark.parametrize(
    "layer, freeze", [(KERAS, _freeze_keras), (OURS, _freeze_ours)]
)
def test_frozen_layers(layer, freeze):
    model = _model(layer)
    freeze(model.get_layer("first"))
    before = _statistics(model)["first"]
    done = _recalibrated(model)
    np.testing.assert_array_equal(_statistics(model)["first"], before)
    assert [one.layer for one in done] == ["second"]
    # The frozen one normalized as inference does.
    values = _below(model, "second", IMAGES, training=False)
    found = _statistics(model)["second"]
    np.testing.assert_allclose(found, _moments(values), rtol=1e-5, atol=1e-7)
    _recalibrated(model, frozen=True)
    found = _statistics(model)["first"]
    np.testing.assert_allclose(found, _moments(IMAGES), rtol=1e-5)


def _nan_in_the_second_batch():
    yield (IMAGES[:8],)
    yield (np.full_like(IMAGES[:8], np.nan),)


def _interrupted():
    yield (IMAGES[:8],)
    yield (IMAGES[:8],)
    yield (IMAGES[:8],)
    raise KeyboardInterrupt


class _InterruptedLater(_Batches):
    """Stops in the second of the passes that a layerwise method makes."""

    read = 0

    def __getitem__(self, i):
        self.read += 1
        if self.read > 8:
            raise KeyboardInterrupt
        return IMAGES[8 * i : 8 * i + 8], CLASSES[8 * i : 8 * i + 8]


@pytest.mark.parametrize(
    "data, method, error",
    [
        (_nan_in_the_second_batch, "batch", ValueError),
        (_interrupted, "batch", KeyboardInterrupt),
        (lambda: _InterruptedLater(), "layerwise", KeyboardInterrupt),
    ],
)
def test_what_fails_leaves_the_old_statistics(data, method, error):
    model = _model(OURS)
    before = model.get_weights()
    with pytest.raises(error):
        _recalibrated(model, data(), method=method, force=True)
    for found, right in zip(model.get_weights(), before):
        np.testing.assert_array_equal(found, right)


@LAYERS
def test_labels_say_that_the_weights_were_trained_for_the_statistics(layer):
    """The first of two outputs is the larger one by its mean."""
    model = keras.Sequential([keras.Input((2,)), layer()])
    values = (RNG.normal(size=(64, 2)) + [9.0, 0.0]).astype("float32")
    settings = {"labels": np.zeros(64, "int32"), "batch_size": 64}
    before = model.get_weights()
    with pytest.raises(ValueError, match="force=True") as error:
        _recalibrated(model, values, **settings)
    assert "accuracy is 1.000 in inference" in str(error.value)
    for found, right in zip(model.get_weights(), before):
        np.testing.assert_array_equal(found, right)
    _recalibrated(model, values, **settings, force=True)
    found = frameworks.array(model.layers[0].moving_mean)
    np.testing.assert_allclose(found, _moments(values)[0], rtol=1e-5)


# The error says it; no warning of NumPy's comes before.
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"model": keras.layers.Dense(1)}, "found no batch"),
        ({"model": 3}, "Received: model of type int"),
        ({"model": keras.Sequential([OURS()])}, "needs a model that is built"),
        ({"method": "precise"}, "method='precise'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 9}, "Received: 5 batches, steps=9"),
        ({"data": IMAGES[:0]}, "`data` is empty"),
        ({"data": 3}, "data of type int"),
        ({"data": None}, "data of type NoneType"),
        ({"data": {}}, "`data` is empty"),
        ({"data": np.float32(1.0)}, "array of shape"),
        ({"data": IMAGES * np.float32(1e30)}, "inputs of 'first'"),
        (
            {"data": IMAGES * np.float32(1e30), "method": "layerwise"},
            "inputs of 'first'",
        ),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"steps": "2"}, "steps='2'"),
        ({"data": np.zeros((4, 6, 6, 2), "float32")}, "shape"),
        ({"labels": CLASSES[:-1]}, "32 labels for 33 samples"),
        ({"labels": [CLASSES, CLASSES]}, "labels of shape"),
        ({"labels": CLASSES.tolist()}, "labels of type list"),
        ({"labels": np.full(33, np.nan)}, "`labels` has values"),
        ({"labels": np.zeros((33, 4, 2))}, "labels of shape"),
    ],
)
def test_bad_input(wrong, match):
    settings = {"model": _model(OURS), "data": IMAGES} | wrong
    before = [v for v in getattr(settings["model"], "weights", [])]
    before = [(v, frameworks.array(v)) for v in before]
    with pytest.raises(ValueError, match=match) as error:
        _recalibrated(**settings)
    assert "\n" not in str(error.value)
    for variable, value in before:
        np.testing.assert_array_equal(frameworks.array(variable), value)


class Projection(keras.Model):
    """A framework's own error, where data does not fit."""

    def __init__(self):
        super().__init__()
        self.weight = self.add_weight(shape=(3, 4), name="weight")
        self.normalization = OURS()

    def call(self, inputs):
        return self.normalization(keras.ops.matmul(inputs, self.weight))


def test_data_that_a_model_does_not_take():
    model = Projection()
    model(IMAGES)
    with pytest.raises(ValueError, match=r"shape \(8, 5\)") as error:
        _recalibrated(model, np.ones((8, 5), "float32"))
    assert "\n" not in str(error.value)


class _EmptyBatches(_Batches):
    def __init__(self, full=0):
        super().__init__()
        self._full = full

    def __getitem__(self, i):
        kept = 8 if i < self._full else 0
        return tuple(x[:kept] for x in super().__getitem__(i))


def test_batches_that_are_empty():
    model, same = _model(OURS), _model(OURS)
    _recalibrated(model, _EmptyBatches(2), force=True)
    _recalibrated(same, IMAGES[:16])
    for found, right in zip(model.get_weights(), same.get_weights()):
        np.testing.assert_array_equal(found, right)
    with pytest.raises(ValueError, match="Received: 0 batches"):
        _recalibrated(model, _EmptyBatches())


def test_all_frozen():
    model = _model(KERAS)
    model.trainable = False
    with pytest.raises(ValueError, match="frozen=True"):
        _recalibrated(model)


def test_a_generator_is_read_once():
    with pytest.raises(ValueError, match="can be read once"):
        data = _forms_of_data()["generator"]()
        _recalibrated(_model(OURS), data, method="layerwise", force=True)

"""What a model is scored by: the loss that it was compiled with, or classes.

Scores are held against NumPy in float64, and against `model.evaluate`.
"""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.diagnostics.batches import Batch
from keras_bn.diagnostics.scores import Comparison
from tests.keras_bn import frameworks

KERAS = keras.layers.BatchNormalization
RNG = np.random.default_rng(0)
N = 40
# Float32 holds outputs and labels; the mean of N * 12 losses at most, none
# of which is more than ten times the mean.
RTOL = 10 * N * 12 * 2.0**-24


def _normal(*shape):
    return RNG.normal(size=(N, *shape)).astype("float32")


def _model(outputs, **kwargs):
    """A model of outputs of these shapes, whose values nobody computes.

    Args:
        outputs: Shape without samples; list or dictionary of several.
        kwargs: For `compile`; none: it is not compiled.
    """
    x = keras.Input((2,))
    names = iter(outputs if isinstance(outputs, dict) else "abcdef")

    def output(shape):
        y = keras.layers.Dense(int(np.prod(shape)))(x)
        return keras.layers.Reshape(shape, name=next(names))(y)

    if isinstance(outputs, tuple):
        model = keras.Model(x, output(outputs))
    elif isinstance(outputs, dict):
        model = keras.Model(x, {k: output(v) for k, v in outputs.items()})
    else:
        model = keras.Model(x, [output(shape) for shape in outputs])
    if kwargs:
        model.compile("sgd", **kwargs)
    return model


def _compared(model, outputs, labels, weights=None, masks=None):
    comparison = Comparison(model)
    batch = Batch(_normal(2), labels, weights)
    comparison.add(outputs, outputs, batch, masks)
    assert comparison.with_batch == comparison.in_inference
    return comparison.name, comparison.in_inference


def _float64(*arrays):
    return [np.asarray(x, "float64") for x in arrays]


def _mse(labels, outputs, weights=1.0):
    labels, outputs = _float64(labels, outputs)
    of_samples = np.square(labels - outputs)
    return np.mean(of_samples.reshape(len(labels), -1).mean(1) * weights)


def _mae(labels, outputs):
    labels, outputs = _float64(labels, outputs)
    return np.mean(np.abs(labels - outputs))


def _bce(labels, outputs):
    labels, outputs = _float64(labels, outputs)
    right = labels * np.log(outputs) + (1 - labels) * np.log(1 - outputs)
    return -np.mean(right)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _named_function(labels, outputs):
    return keras.ops.mean(keras.ops.abs(labels - outputs), axis=-1)


class _Half(keras.losses.Loss):
    def call(self, labels, outputs):
        return 0.5 * keras.ops.mean(keras.ops.square(labels - outputs), -1)


OUT = _normal(3)
FLOATS = _normal(3)
PAIR = _normal(3), _normal(2)
LABEL_PAIR = _normal(3), _normal(2)
BITS = RNG.integers(0, 2, (N, 3))
WEIGHTS = RNG.uniform(0.1, 2.0, N)
STEPS, STEP_LABELS = _normal(5, 4), RNG.integers(0, 4, (N, 5))
MSE_AND_MAE = _mse(LABEL_PAIR[0], PAIR[0]) + 0.25 * _mae(LABEL_PAIR[1], PAIR[1])

# From a name to outputs, labels, what `compile` takes, and the right loss.
LOSSES = {
    "regression": (OUT, FLOATS, {"loss": "mse"}, _mse(FLOATS, OUT)),
    "one loss weight": (
        *(OUT, FLOATS, {"loss": "mse", "loss_weights": [0.5]}),
        0.5 * _mse(FLOATS, OUT),
    ),
    "class of a loss": (
        *(OUT, FLOATS, {"loss": keras.losses.MeanAbsoluteError()}),
        _mae(FLOATS, OUT),
    ),
    "sum over the batch": (
        *(OUT, FLOATS, {"loss": keras.losses.MeanAbsoluteError("sum")}),
        _mae(FLOATS, OUT) * N,
    ),
    "function": (OUT, FLOATS, {"loss": _named_function}, _mae(FLOATS, OUT)),
    "lambda": (
        *(OUT, FLOATS, {"loss": lambda y, x: keras.ops.abs(y - x)}),
        _mae(FLOATS, OUT),
    ),
    "loss of one's own": (
        *(OUT, FLOATS, {"loss": _Half()}),
        0.5 * _mse(FLOATS, OUT),
    ),
    "integers of a regression": (
        *(OUT, BITS * 3, {"loss": "mse"}),
        _mse(BITS * 3, OUT),
    ),
    "integers of one output": (
        *(OUT[:, :1], BITS[:, 0], {"loss": "mse"}),
        _mse(BITS[:, :1], OUT[:, :1]),
    ),
    "the same label for each output": (
        *(OUT, BITS[:, :1], {"loss": "mse"}),
        _mse(np.repeat(BITS[:, :1], 3, axis=1), OUT),
    ),
    "autoencoder": (
        *(STEPS, STEPS[::-1], {"loss": "mse"}),
        _mse(STEPS[::-1], STEPS),
    ),
    "several labels": (
        *(_sigmoid(OUT), BITS, {"loss": "binary_crossentropy"}),
        _bce(BITS, _sigmoid(OUT)),
    ),
    "several labels, floats": (
        _sigmoid(OUT),
        BITS.astype("float32"),
        {"loss": keras.losses.BinaryCrossentropy()},
        _bce(BITS, _sigmoid(OUT)),
    ),
    "binary": (
        _sigmoid(OUT[:, :1]),
        BITS[:, 0],
        {"loss": "binary_crossentropy"},
        _bce(BITS[:, :1], _sigmoid(OUT[:, :1])),
    ),
    "negative loss": (
        *(OUT, FLOATS, {"loss": "cosine_similarity"}),
        -np.mean(
            np.sum(OUT * FLOATS, 1)
            / np.linalg.norm(OUT.astype(float), axis=1)
            / np.linalg.norm(FLOATS.astype(float), axis=1)
        ),
    ),
    "list of outputs": (
        list(PAIR),
        list(LABEL_PAIR),
        {"loss": ["mse", "mae"], "loss_weights": [1.0, 0.25]},
        MSE_AND_MAE,
    ),
    "labels in a tuple": (
        list(PAIR),
        LABEL_PAIR,
        {"loss": ["mse", "mae"], "loss_weights": [1.0, 0.25]},
        MSE_AND_MAE,
    ),
    "losses and labels by name": (
        list(PAIR),
        dict(zip("ab", LABEL_PAIR)),
        {"loss": {"a": "mse", "b": "mae"}, "loss_weights": {"a": 1, "b": 0.25}},
        MSE_AND_MAE,
    ),
    "dictionary of outputs": (
        {"q": PAIR[0], "p": PAIR[1]},
        {"p": LABEL_PAIR[1], "q": LABEL_PAIR[0]},
        {
            "loss": {"q": keras.losses.MeanSquaredError(), "p": "mae"},
            "loss_weights": {"q": 1.0, "p": 0.25},
        },
        MSE_AND_MAE,
    ),
    "one loss for two outputs": (
        list(PAIR),
        list(LABEL_PAIR),
        {"loss": "mae"},
        _mae(LABEL_PAIR[0], PAIR[0]) + _mae(LABEL_PAIR[1], PAIR[1]),
    ),
    "an output without a loss": (
        *(list(PAIR), list(LABEL_PAIR), {"loss": ["mse", None]}),
        _mse(LABEL_PAIR[0], PAIR[0]),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    outputs, labels, settings, right = LOSSES[name]
    shapes = keras.tree.map_structure_up_to(
        outputs, lambda x: x.shape[1:], outputs
    )
    model = _model(shapes, **settings)
    found = _compared(model, outputs, labels)
    assert found[0] == "loss"
    assert found[1] == pytest.approx(right, rel=RTOL, abs=RTOL)


def _one_hot(numbers, classes):
    return np.eye(classes, dtype="float32")[numbers]


NUMBERS = RNG.integers(0, 3, N)
SOFT = 0.8 * _one_hot(NUMBERS, 3) + 0.1 * _one_hot(RNG.integers(0, 3, N), 3)
RIGHT = OUT.argmax(-1) == NUMBERS
STEPS_RIGHT = STEPS.argmax(-1) == STEP_LABELS
IGNORED = np.where(STEP_LABELS == 3, -1, STEP_LABELS)

# The same, with the right accuracy; None: the model is not compiled.
ACCURACIES = {
    "numbers": (OUT, NUMBERS, None, RIGHT.mean()),
    "numbers in floats": (OUT, NUMBERS.astype("float32"), None, RIGHT.mean()),
    "numbers in a column": (OUT, NUMBERS[:, np.newaxis], None, RIGHT.mean()),
    "one-hot": (OUT, _one_hot(NUMBERS, 3), None, RIGHT.mean()),
    "one-hot of a regression": (
        *(OUT, _one_hot(NUMBERS, 3), {"loss": "mse"}),
        RIGHT.mean(),
    ),
    "numbers that the loss does not take": (
        *(OUT, NUMBERS, {"loss": "mse"}),
        RIGHT.mean(),
    ),
    "soft labels": (
        *(OUT, SOFT, {"loss": "categorical_crossentropy"}),
        (OUT.argmax(-1) == SOFT.argmax(-1)).mean(),
    ),
    "class of a loss": (
        OUT,
        NUMBERS.astype("float32"),
        {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        RIGHT.mean(),
    ),
    "function": (
        *(OUT, NUMBERS, {"loss": keras.losses.sparse_categorical_crossentropy}),
        RIGHT.mean(),
    ),
    "loss in a list": (OUT, NUMBERS, {"loss": ["crossentropy"]}, RIGHT.mean()),
    "numbers of steps": (
        *(STEPS, STEP_LABELS, {"loss": "sparse_categorical_crossentropy"}),
        STEPS_RIGHT.mean(),
    ),
    "a class that is ignored": (
        STEPS,
        IGNORED,
        {"loss": keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)},
        STEPS_RIGHT[IGNORED >= 0].mean(),
    ),
}


@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracies(name):
    outputs, labels, settings, right = ACCURACIES[name]
    model = _model(outputs.shape[1:], **settings or {})
    found = _compared(model, outputs, labels)
    assert found == ("accuracy", pytest.approx(right))


def test_sample_weights():
    model = _model((3,), loss="mse")
    _, found = _compared(model, OUT, FLOATS, WEIGHTS)
    # Keras divides by the number of samples.
    assert found == pytest.approx(_mse(FLOATS, OUT, WEIGHTS), rel=RTOL)
    model = _model((3,), loss="sparse_categorical_crossentropy")
    _, found = _compared(model, OUT, NUMBERS, WEIGHTS)
    assert found == pytest.approx(np.average(RIGHT, weights=WEIGHTS))
    model = _model([(3,), (2,)], loss=["mse", "mse"])
    _, found = _compared(
        model, list(PAIR), list(LABEL_PAIR), [WEIGHTS, WEIGHTS[::-1]]
    )
    right = _mse(LABEL_PAIR[0], PAIR[0], WEIGHTS)
    right += _mse(LABEL_PAIR[1], PAIR[1], WEIGHTS[::-1])
    assert found == pytest.approx(right, rel=RTOL)


def test_masks():
    mask = RNG.random((N, 5)) < 0.6
    labels = _normal(5, 4)
    model = _model((5, 4), loss="mse")
    _, found = _compared(model, STEPS, labels, masks=mask)
    square = np.square(np.float64(STEPS) - labels).mean(-1)
    assert found == pytest.approx(square[mask].mean(), rel=RTOL)
    model = _model((5, 4), loss="sparse_categorical_crossentropy")
    name, found = _compared(model, STEPS, STEP_LABELS, masks=mask)
    assert name == "accuracy"
    assert found == pytest.approx(STEPS_RIGHT[mask].mean())


def test_labels_that_are_one_hot_in_the_first_batch_alone():
    """Both are of all batches: the loss, by the sizes of batches."""
    model = _model((3,), loss="binary_crossentropy")
    comparison = Comparison(model)
    outputs = _sigmoid(OUT)
    labels = np.concatenate([_one_hot(NUMBERS[:30], 3), np.ones((10, 3))])
    for rows in (slice(30), slice(30, N)):
        batch = Batch(OUT[rows], labels[rows])
        comparison.add(outputs[rows], outputs[rows], batch)
    assert comparison.name == "loss"
    right = _bce(labels, outputs)
    assert comparison.in_inference == pytest.approx(right, rel=RTOL)


class _OwnLoss(keras.Model):
    """Has a `compute_loss` of its own, which keeps a metric."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = keras.metrics.Sum(name="seen")

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = keras.ops.mean(keras.ops.abs(y - y_pred)) * 3.0
        self.seen.update_state(loss)
        return loss + 0.0 * keras.ops.sum(x)


def test_compute_loss():
    x = keras.Input((2,))
    model = _OwnLoss(x, keras.layers.Dense(3)(x))
    name, found = _compared(model, OUT, FLOATS)
    assert name == "loss"
    assert found == pytest.approx(3 * _mae(FLOATS, OUT), rel=RTOL)
    assert float(frameworks.array(model.seen.result())) == 0.0


@pytest.mark.parametrize(
    "labels, settings, match",
    [
        (FLOATS, {}, "Compile the model with its loss"),
        (BITS, {}, "Compile the model with its loss"),
        (NUMBERS + 1, {}, "Compile the model with its loss"),
        (np.array(["a"] * N), {}, "Compile the model with its loss"),
        (_normal(7), {"loss": "mse"}, r"labels of shape \(40, 7\)"),
        ({"z": FLOATS}, {"loss": {"z": "mse"}}, "cannot be computed"),
        ([FLOATS, FLOATS], {"loss": ["mse", "mse"]}, "cannot be computed"),
        (NUMBERS[:3], {"loss": "mse"}, "a label for each sample"),
    ],
)
def test_what_cannot_be_scored(labels, settings, match):
    model = _model((3,), **settings)
    with pytest.raises(ValueError, match=match) as error:
        _compared(model, OUT, labels)
    assert "\n" not in str(error.value)


def _pair_of(loss, in_inference, with_batch, labels):
    comparison = Comparison(_model(labels.shape[1:], loss=loss))
    comparison.add(in_inference, with_batch, Batch(labels, labels))
    return comparison


def test_which_is_better():
    near, far = FLOATS + 0.1 * OUT, FLOATS + OUT
    for loss in ("mse", "mae", "cosine_similarity"):
        better = _pair_of(loss, near, far, FLOATS)
        assert better.better(0.05) == "in_inference"
        assert _pair_of(loss, far, near, FLOATS).better() == "with_batch"
        assert _pair_of(loss, far, far, FLOATS).better() is None
    compared = _pair_of("mse", near, far, FLOATS)
    assert compared.lost_with_batch() == pytest.approx(
        np.log(_mse(FLOATS, far) / _mse(FLOATS, near)), rel=RTOL
    )
    # Of noise alone neither is better by more than its standard error tells.
    one, other = FLOATS + _normal(3), FLOATS + _normal(3)
    noise = _pair_of("mse", one, other, FLOATS)
    assert noise.standard_error() > abs(noise.lost_with_batch()) / 4


def test_what_is_not_finite_is_worse():
    bad = np.full_like(FLOATS, np.nan)
    assert _pair_of("mse", OUT, bad, FLOATS).better() == "in_inference"
    assert _pair_of("mse", bad, OUT, FLOATS).better() == "with_batch"
    assert _pair_of("mse", bad, bad, FLOATS).better() is None


def _perfect(compiled=True):
    """Its two outputs are right in inference, and wrong with its batches."""
    model = keras.Sequential(
        [keras.Input((2,)), KERAS(epsilon=1e-3), keras.layers.Dense(2)]
    )
    # The data has none of these moments.
    model.layers[0].moving_mean.assign([1.0, -1.0])
    model.layers[0].moving_variance.assign([4.0, 0.5])
    if compiled:
        model.compile("sgd", "mse")
    values = RNG.normal(5.0, 3.0, (64, 2)).astype("float32")
    labels = model.predict(values, verbose=0)
    return model, values, labels


def _pairs(*arrays):
    yield tuple(x[:48] for x in arrays)
    yield tuple(x[48:] for x in arrays)


@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_a_regression_that_is_right_in_inference_is_kept(method):
    model, values, labels = _perfect()
    before = model.get_weights()
    with pytest.raises(ValueError, match="loss is .* in inference and"):
        keras_bn.recalibrate(
            model, values, labels=labels, method=method, verbose=0
        )
    for found, right in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, right)
    report = keras_bn.audit(model, values, labels, verbose=0)
    assert report.scores.name == "loss"
    assert report.scores.lost_with_batch > 1.0
    assert "recalibrate" not in str(report)


def test_scores_are_those_of_evaluate():
    """With weights that come with the data, and none of the regularizers."""
    model, values, labels = _perfect()
    weights = RNG.uniform(size=64).astype("float32")
    noisy = labels + RNG.normal(size=labels.shape).astype("float32")
    data = values, noisy, weights
    right = model.evaluate(*data[:2], 48, 0, weights)
    report = keras_bn.audit(model, _pairs(*data), verbose=0)
    assert report.scores.in_inference == pytest.approx(right, rel=RTOL)
    model.layers[1].kernel.regularizer = keras.regularizers.L2(10.0)
    layers = [*model.layers, keras.layers.ActivityRegularization(l2=1.0)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    model.compile("sgd", "mse")
    regularized = model.evaluate(*data[:2], 48, 0, weights)
    assert regularized > right + 1.0
    report = keras_bn.audit(model, _pairs(*data), verbose=0)
    assert report.scores.in_inference == pytest.approx(right, rel=RTOL)


def test_masks_of_the_model():
    x = keras.Input((5, 2))
    y = KERAS(epsilon=0.0)(keras.layers.Masking()(x))
    model = keras.Model(x, y)
    model.compile("sgd", "mse")
    values = RNG.normal(2.0, 1.0, (N, 5, 2)).astype("float32")
    kept = RNG.random((N, 5)) < 0.6
    values[~kept] = 0.0
    labels = _normal(5, 2)
    report = keras_bn.audit(model, values, labels, verbose=0)
    square = np.square(np.float64(values) - labels).mean(-1)
    right = square[kept].mean()
    assert report.scores.in_inference == pytest.approx(right, rel=RTOL)
    mean, deviation = values[kept].mean(0), values[kept].std(0)
    square = np.square((values - mean) / deviation - labels).mean(-1)
    right = square[kept].mean()
    assert report.scores.with_batch == pytest.approx(right, rel=RTOL)


def test_several_outputs_end_to_end():
    x = keras.Input((2,), name="x")
    y = KERAS()(x)
    model = keras.Model(
        {"x": x},
        {
            "a": keras.layers.Dense(2, name="a")(y),
            "b": keras.layers.Dense(1, name="b")(y),
        },
    )
    model.compile(
        "sgd", loss={"a": "mse", "b": "mae"}, loss_weights={"a": 1, "b": 0.5}
    )
    model.layers[1].moving_mean.assign([3.0, -3.0])
    values = {"x": _normal(2)}
    labels = model.predict(values, verbose=0)
    labels = {name: array + _normal(1) for name, array in labels.items()}
    right = model.evaluate(
        values, labels, batch_size=N, verbose=0, return_dict=True
    )
    report = keras_bn.audit(model, values, labels, verbose=0)
    found = report.scores.in_inference
    assert found == pytest.approx(right["loss"], rel=RTOL)
    found = keras_bn.recalibrate(
        model, values, labels=labels, force=True, verbose=0
    )
    assert found[0].positions == N


def test_a_model_that_is_not_compiled():
    model, values, labels = _perfect(compiled=False)
    for function in (keras_bn.audit, keras_bn.recalibrate):
        with pytest.raises(ValueError, match="Compile the model with its"):
            function(model, values, labels=labels, verbose=0)
    # Labels that come with the data are left out, and it says what to do.
    model.layers[0].gamma.assign([1.5, 1.5])
    report = keras_bn.audit(model, _pairs(values, labels), verbose=0)
    assert report.scores is None
    assert "model.compile(loss=...)" in str(report)

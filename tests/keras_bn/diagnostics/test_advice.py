"""An audit does not advise what was just done, or refused."""

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn.diagnostics import digits

OURS = keras_bn.BatchNormalization
RNG = np.random.default_rng(0)
RECALIBRATE = "keras_bn.recalibrate(model, data)"
LAYERWISE = 'keras_bn.recalibrate(model, data, method="layerwise")'
FORCED = 'keras_bn.recalibrate(model, data, method="layerwise", force=True)'
UNLIKE = "keras_bn.recalibrate(model, data_like_this)"


def _remedies(*arguments):
    report = keras_bn.audit(*arguments, verbose=0)
    return {one.remedy for one in report.findings}


def _stale():
    model = digits.trained()
    keras_bn.reset_statistics(model)
    return model


def test_statistics_that_were_recalibrated_on_other_data():
    model = _stale()
    values, labels = digits.unseen()
    assert _remedies(model, values, labels) == {RECALIBRATE}
    noise = RNG.normal(90.0, 3.0, values.shape).astype("float32")
    keras_bn.recalibrate(model, noise, verbose=0)
    assert _remedies(model, values, labels) == {LAYERWISE}
    keras_bn.recalibrate(model, noise, method="layerwise", verbose=0)
    assert _remedies(model, values, labels) == {UNLIKE}
    keras_bn.recalibrate(model, values, verbose=0)
    assert _remedies(model, values, labels) == set()


def _batches():
    """Two batches that are far from each other: normalized, they are alike."""
    for mean in (-20.0, 20.0):
        yield (mean + RNG.normal(size=(64, 1)).astype("float32"),)


def _squares():
    x = keras.Input((1,))
    y = OURS(gamma_initializer=keras.initializers.Constant(1.5))(x)
    y = OURS(gamma_initializer="ones")(keras.layers.Multiply()([y, y]))
    model = keras.Model(x, y)
    # As if it had been trained.
    model.layers[1].gamma.assign([1.0])
    return model


def test_statistics_that_batches_would_leave_as_they_are(tmp_path):
    """Nobody knows the past of a file, but what a method would do."""
    model = _squares()
    data = [x for (x,) in _batches()]
    outputs = np.concatenate(
        [keras.ops.convert_to_numpy(model(x, training=True)) for x in data]
    )
    model.compile("sgd", "mse")
    labels = np.split(outputs, 2)
    keras_bn.reset_statistics(model)
    keras_bn.recalibrate(model, ((x,) for x in data), verbose=0)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert _remedies(model, zip_of(data, labels)) == {LAYERWISE}
    keras_bn.recalibrate(
        model, np.concatenate(data), method="layerwise", verbose=0
    )
    assert _remedies(model, zip_of(data, labels)) == set()


def zip_of(*lists):
    yield from zip(*lists)


def test_a_refusal():
    """Data that is sorted: a batch of one class tells nothing of inference."""
    model = _stale()
    values, labels = digits.unseen()
    assert _remedies(model, values, labels) == {RECALIBRATE}
    order = np.argsort(labels, kind="stable")
    data = values[order], labels[order]
    for method in ("batch", "layerwise"):
        with pytest.raises(ValueError, match="Received: force=False"):
            keras_bn.recalibrate(
                model,
                data[0],
                labels=data[1],
                method=method,
                batch_size=16,
                verbose=0,
            )
        assert _remedies(model, *data) == {FORCED}
    keras_bn.recalibrate(
        model, data[0], method="layerwise", force=True, verbose=0
    )
    assert _remedies(model, *data) == set()


def test_a_refusal_of_weights_that_were_trained_in_inference_mode():
    model = digits.trained(inference=True)
    values, labels = digits.unseen()
    with pytest.raises(ValueError, match="Received: force=False"):
        keras_bn.recalibrate(model, values, labels=labels, verbose=0)
    # The weights alone would ask for a recalibration.
    model.compile("sgd", "mse")
    model.optimizer.iterations.assign(3)
    for layer in (model.get_layer("first"), model.get_layer("second")):
        layer.moving_mean.assign(layer.moving_mean + 1e-3)
    for arguments in ((model,), (model, values), (model, values, labels)):
        remedies = _remedies(*arguments)
        assert remedies
        assert not [x for x in remedies if "recalibrate" in x], remedies


def test_a_moving_average_that_lags():
    """It does not after `recalibrate`."""
    values, labels = digits.unseen()
    model = digits.trained()
    report = keras_bn.audit(model, values, labels, verbose=0)
    assert not report.recalibrated
    keras_bn.recalibrate(model, values, verbose=0)
    report = keras_bn.audit(model, values, labels, verbose=0)
    assert report.recalibrated
    assert "keras_bn.recalibrate" not in str(report)


class WithoutSecond(keras.Model):
    """Has a layer that its calls leave out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = OURS(), OURS(name="second")
        self.first.build((None, 3))
        self.second.build((None, 3))

    def call(self, inputs, training=None):
        return self.first(inputs, training=training)


@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_a_layer_that_data_does_not_reach(method):
    values = RNG.normal(3.0, 1.0, (64, 3)).astype("float32")
    model = WithoutSecond()
    model(values)
    model.first.gamma.assign([1.1] * 3)
    model.second.moving_variance.assign([-1.0] * 3)
    assert RECALIBRATE in _remedies(model)
    keras_bn.recalibrate(model, values, method=method, verbose=0)
    remedies = _remedies(model)
    assert "model.summary()  # does anything call the layer?" in remedies
    assert RECALIBRATE not in remedies

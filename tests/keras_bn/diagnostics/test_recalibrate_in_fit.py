"""`RecalibrateStatistics`, held against training and `recalibrate` by hand.

A twin trains alone, from the same weights and on the same batches. Its
weights, or their averages, are put into a model that is recalibrated.
"""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.diagnostics import forward_passes
from tests.keras_bn import frameworks
from tests.keras_bn.diagnostics.stale_models import KERAS
from tests.keras_bn.diagnostics.stale_models import OURS
from tests.keras_bn.diagnostics.stale_models import X
from tests.keras_bn.diagnostics.stale_models import Y

SWAPS = pytest.mark.parametrize(
    "swap_on_epoch", [None, False, True], ids=["weights", "ema", "ema on epoch"]
)
EPOCHS = 2


def _model(averages, layer=OURS):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            layer(),
            keras.layers.Dense(3),
            KERAS(),
            keras.layers.Dense(1),
        ]
    )
    settings = {"use_ema": True, "ema_momentum": 0.8} if averages else {}
    model.compile(keras.optimizers.SGD(0.05, **settings), "mse")
    return model


class _Recorder(keras.callbacks.Callback):
    """The weights that a callback in its place finds."""

    def __init__(self):
        super().__init__()
        self.found = {"test": [], "epoch": []}

    def on_test_begin(self, logs=None):
        self.found["test"].append(self._weights())

    def on_epoch_end(self, epoch, logs=None):
        self.found["epoch"].append(self._weights())

    def _weights(self):
        return [np.array(w) for w in self.model.get_weights()]


def _fit(model, *callbacks, epochs=EPOCHS):
    return model.fit(
        X,
        Y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        validation_data=(X, Y),
        callbacks=list(callbacks),
        verbose=0,
    )


def _recalibrated(weights):
    model = _model(averages=False)
    model.set_weights(weights)
    keras_bn.recalibrate(model, X, batch_size=16, verbose=0, force=True)
    return [np.array(w) for w in model.get_weights()], model


def _averages(model):
    """The weights of a model with the averages that its optimizer has."""
    found = {
        id(v): frameworks.array(average.value)
        for v, average in zip(
            model.optimizer._trainable_variables,
            model.optimizer._model_variables_moving_average,
        )
    }
    return [
        np.array(found.get(id(v), frameworks.array(v.value)))
        for v in model.weights
    ]


class _Twin(keras.callbacks.Callback):
    """The weights and their averages in training, at the end of epochs."""

    def __init__(self):
        super().__init__()
        self.weights, self.averages = [], []

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        self.weights.append([np.array(w) for w in model.get_weights()])
        if model.optimizer.use_ema:
            self.averages.append(_averages(model))


def _assert_equal(found, right):
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


@SWAPS
def test_what_is_evaluated_saved_and_kept(swap_on_epoch):
    averages = swap_on_epoch is not None
    alone = _Twin()
    twin = _model(averages)
    _fit(twin, alone)

    first, last = _Twin(), _Recorder()
    callbacks = [keras_bn.RecalibrateStatistics(X, batch_size=16), last]
    if averages:
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        callbacks.insert(0, swap)
    model = _model(averages)
    history = _fit(model, first, *callbacks).history

    # The training is what it is without.
    for found, right in zip(first.weights, alone.weights, strict=True):
        _assert_equal(found, right)
    evaluated = alone.averages if averages else alone.weights
    saved = alone.averages if swap_on_epoch else alone.weights
    for epoch in range(EPOCHS):
        right, by_hand = _recalibrated(evaluated[epoch])
        _assert_equal(last.found["test"][epoch], right)
        loss = by_hand.evaluate(X, Y, verbose=0)
        assert history["val_loss"][epoch] == pytest.approx(loss, rel=1e-4)
        right, _ = _recalibrated(saved[epoch])
        _assert_equal(last.found["epoch"][epoch], right)
    _assert_equal(model.get_weights(), _recalibrated(evaluated[-1])[0])


def test_the_saved_model(tmp_path):
    path = str(tmp_path / "{epoch}.keras")
    model = _model(averages=True)
    history = _fit(
        model,
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras_bn.RecalibrateStatistics(X, method="layerwise"),
        keras.callbacks.ModelCheckpoint(path),
    ).history
    for epoch in range(EPOCHS):
        saved = keras.models.load_model(path.format(epoch=epoch + 1))
        loss = saved.evaluate(X, Y, verbose=0)
        assert loss == pytest.approx(history["val_loss"][epoch], rel=1e-4)


def test_evaluate_alone():
    model = _model(averages=False)
    before = model.get_weights()
    last = _Recorder()
    callbacks = [keras_bn.RecalibrateStatistics(X, batch_size=16), last]
    model.evaluate(X, Y, callbacks=callbacks, verbose=0)
    _assert_equal(last.found["test"][0], _recalibrated(before)[0])
    _assert_equal(model.get_weights(), before)


def test_a_second_fit_and_counters():
    model = _model(False, lambda: OURS(momentum=None))
    callback = keras_bn.RecalibrateStatistics(X, steps=2, batch_size=16)
    _fit(model, callback)
    _fit(model, callback)
    layer = model.layers[1]
    found = frameworks.array(layer.num_batches_tracked.value)
    np.testing.assert_array_equal(found, 2)


class _Labelled(keras.utils.PyDataset):
    """The first of two outputs is the larger one by its mean."""

    values = X[:, :2] * [1.0, 0.5] + [9.0, -2.0]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.values[8 * i : 8 * i + 8], np.zeros(8, "int32")


def test_labels_do_not_end_the_training():
    model = keras.Sequential([keras.Input((2,)), OURS()])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    with pytest.raises(ValueError, match="Received: force=False"):
        keras_bn.recalibrate(model, _Labelled(), verbose=0)
    callback = keras_bn.RecalibrateStatistics(_Labelled())
    values = _Labelled.values
    model.fit(values, np.zeros((32, 2)), callbacks=[callback], verbose=0)
    found = frameworks.array(model.layers[0].moving_mean.value)
    np.testing.assert_allclose(found, values.mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"data": (x for x in [(X,)])}, "data of type generator"),
        ({"data": X[:0]}, "`data` is empty"),
        ({"data": 3}, "data of type int"),
        ({"method": "precise"}, "method='precise'"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        keras_bn.RecalibrateStatistics(**{"data": X} | wrong)


def test_no_batch_normalization():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = keras_bn.RecalibrateStatistics(X)
    with pytest.raises(ValueError, match="found no batch"):
        _fit(model, callback)
    assert not int(frameworks.array(model.optimizer.iterations.value))


def test_forward_passes_are_compiled_once(monkeypatch):
    """Those of both modes, though `recalibrate` runs seven times."""
    compiled = forward_passes.compiled
    made = []

    def counted(*arguments):
        made.append(arguments)
        return compiled(*arguments)

    monkeypatch.setattr(forward_passes, "compiled", counted)
    model = _model(averages=False)
    callback = keras_bn.RecalibrateStatistics(X, batch_size=16)
    _fit(model, callback, epochs=3)
    assert len(made) == 2
    weights = [np.array(w) for w in model.get_weights()]
    right, _ = _recalibrated(weights)
    for found, expected in zip(weights, right):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # What was made is not of the next training.
    made.clear()
    _fit(model, callback, epochs=1)
    assert len(made) == 2


class _Freeze(keras.callbacks.Callback):
    """Freezes a layer after the first epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.layers[3].trainable = False
            self.frozen = self.model.layers[3].get_weights()


def test_a_layer_that_is_frozen_meanwhile():
    model = _model(averages=False)
    freeze = _Freeze()
    callback = keras_bn.RecalibrateStatistics(X, batch_size=16)
    model.fit(X, Y, callbacks=[freeze, callback], verbose=0)
    before = model.get_weights()
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_test_begin()
    callback.on_test_end()
    freeze.on_epoch_begin(1)
    callback.on_epoch_end(1)
    for found, right in zip(model.layers[3].get_weights(), freeze.frozen):
        np.testing.assert_array_equal(found, right)
    # The layer before it goes with its own statistics all the same.
    twin = _model(averages=False)
    twin.set_weights(before)
    twin.layers[3].trainable = False
    keras_bn.recalibrate(twin, X, batch_size=16, verbose=0, force=True)
    for found, right in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_allclose(found, right, rtol=1e-6)

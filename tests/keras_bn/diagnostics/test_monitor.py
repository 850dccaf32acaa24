"""`StatisticsMonitor`: statistics that stand still, and curves.

The curves are read by TensorBoard's own reader and held against NumPy's
moments of the batches that the layer was given.
"""

import contextlib
import sys
import time
import warnings

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from tensorboard.util import tensor_util

import keras_bn
from experiments import article
from experiments import models
from tests.keras_bn import frameworks
from tests.keras_bn.diagnostics.stale_models import KERAS
from tests.keras_bn.diagnostics.stale_models import OURS
from tests.keras_bn.diagnostics.stale_models import InInference
from tests.keras_bn.diagnostics.stale_models import X
from tests.keras_bn.diagnostics.stale_models import Y
from tests.keras_bn.diagnostics.stale_models import compiled
from tests.keras_bn.diagnostics.stale_models import model_of

LAYERS = pytest.mark.parametrize("layer", [OURS, KERAS], ids=["ours", "keras"])


def _fit(model, *callbacks, epochs=1, batch_size=4, **kwargs):
    model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
        **kwargs,
    )


def _monitor(**kwargs):
    return keras_bn.StatisticsMonitor(**{"every": 3} | kwargs)


@contextlib.contextmanager
def _silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@LAYERS
def test_statistics_that_stand_still(layer):
    model = compiled(InInference(layer(name="first")))
    with pytest.warns(UserWarning) as warned:
        _fit(model, _monitor(), epochs=3)
    warning, *more = [w for w in warned if "stood still" in str(w.message)]
    message = str(warning.message)
    assert "'first' stood still over 3 steps" in message
    assert "keras_bn.recalibrate(model, data" in message
    assert "training=True" in message
    assert not more
    assert warning.filename == __file__


def test_the_error():
    model = compiled(InInference(OURS()))
    with pytest.raises(RuntimeError, match="over 3 steps"):
        _fit(model, _monitor(on_stale="raise"))
    assert 0 < int(frameworks.array(model.optimizer.iterations.value)) < 8


def test_fewer_steps_than_every():
    model = compiled(InInference(OURS()))
    with pytest.warns(UserWarning, match="over 8 steps"):
        _fit(model, _monitor(every=100))


def test_no_batch_counts():
    model = compiled(model_of(OURS(momentum=1.0)))
    with pytest.warns(UserWarning, match="momentum=1.0"):
        _fit(model, _monitor())


@pytest.mark.parametrize(
    "kwargs", [{"scale": False, "center": False}, {"name": "plain"}]
)
def test_layers_that_stand_still_among_others(kwargs):
    """Without gamma and beta those of other layers count."""
    still = InInference(OURS(**kwargs))
    inputs = keras.Input((3,))
    model = keras.Model(inputs, still(OURS(name="moves")(inputs)))
    name = still.normalize.name
    with pytest.warns(UserWarning, match=f"normalization '{name}' stood"):
        _fit(compiled(model), _monitor())


def _all_kinds():
    return model_of(
        OURS(),
        KERAS(),
        OURS(renorm=True),
        KERAS(renorm=True),
        OURS(virtual_batch_size=2),
        OURS(debias=True),
        OURS(momentum=None),
        OURS(scale=False, center=False),
        OURS(use_moving_statistics=True),
    )


def _nested():
    inner = model_of(OURS(), KERAS(), name="inner")
    inputs = keras.Input((3,))
    return keras.Model(inputs, inner(KERAS()(inputs)))


def _built_late():
    return keras.Sequential([OURS(), keras.layers.Dense(1)])


@pytest.mark.parametrize("model", [_all_kinds, _nested, _built_late])
def test_healthy_models(model, tmp_path):
    """Several epochs with evaluation, and `fit` again."""
    model = compiled(model())
    monitor = _monitor(log_dir=str(tmp_path))
    with _silence():
        _fit(model, monitor, epochs=2, validation_data=(X[:8], Y[:8]))
        _fit(model, monitor, initial_epoch=2, epochs=3)
    assert model.optimizer.iterations == 24


if not frameworks.IS_TORCH:

    def test_several_steps_in_one_execution(tmp_path):
        model = compiled(model_of(KERAS()), steps_per_execution=3)
        with _silence():
            _fit(model, _monitor(log_dir=str(tmp_path)), epochs=2)
        model = compiled(InInference(KERAS()), steps_per_execution=4)
        with pytest.warns(UserWarning, match="over 4 steps"):
            _fit(model, _monitor())


def _frozen(layer, setting, value):
    setattr(layer, setting, value)
    return layer


def _each_by_itself():
    return model_of(
        _frozen(KERAS(), "trainable", False),
        _frozen(OURS(), "trainable", False),
        OURS(update_moving_statistics=False),
    )


def _never_used():
    return InInference(OURS(use_moving_statistics=False))


@pytest.mark.parametrize("model", [_each_by_itself, _never_used])
def test_still_on_purpose(model):
    with _silence():
        _fit(compiled(model()), _monitor(), epochs=2)


def test_weights_that_do_not_move():
    with _silence():
        _fit(compiled(InInference(OURS()), learning_rate=0.0), _monitor())


@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_statistics_that_have_arrived(momentum):
    """All data is one batch, and the layer comes first."""
    model = compiled(model_of(OURS(momentum=momentum)))
    layer = model.layers[0]
    many = [np.tile(values, (20, 1)) for values in (X, Y)]
    settings = {"batch_size": len(X), "shuffle": False, "verbose": 0}
    with _silence():
        model.fit(*many, epochs=7, callbacks=[_monitor(every=20)], **settings)
    before = np.array(frameworks.array(layer.moving_mean.value))
    model.fit(*many, **settings)
    now = frameworks.array(layer.moving_mean.value)
    np.testing.assert_array_equal(now, before)


def _curves(folder):
    events = EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    return {
        tag: {
            event.step: tensor_util.make_ndarray(event.tensor_proto).item()
            for event in events.Tensors(tag)
        }
        for tag in events.Tags()["tensors"]
    }


def test_curves(tmp_path):
    """After three steps the next batch is the fourth."""
    layers = [
        KERAS(momentum=0.9),
        KERAS(renorm=True),
        OURS(),
        OURS(debias=True),
        OURS(momentum=None),
        OURS(momentum=0.0),
        OURS(renorm=True, debias=True),
        OURS(momentum=None, virtual_batch_size=4),
    ]
    inputs = keras.Input((3,))
    outputs = keras.layers.Add()([layer(inputs) for layer in layers])
    model = compiled(keras.Model(inputs, keras.layers.Dense(1)(outputs)))
    _fit(model, _monitor(log_dir=str(tmp_path)))
    moving, batch = _curves(tmp_path / "moving"), _curves(tmp_path / "batch")
    batches = {step: X[4 * step - 4 : 4 * step] for step in (1, 4, 7)}
    means = {n: x.mean(0).mean() for n, x in batches.items()}
    variances = {n: x.var(0).mean() for n, x in batches.items()}
    for layer in layers:
        found = batch.pop(f"{layer.path}/mean")
        assert found == pytest.approx(means, rel=1e-4), layer
        found = batch.pop(f"{layer.path}/variance")
        assert found == pytest.approx(variances, rel=1e-3), layer
        assert list(moving[f"{layer.path}/gamma"]) == [1, 4, 7]
    assert not batch


def test_no_curves_of_batches_that_nobody_counts(tmp_path):
    model = compiled(model_of(OURS(virtual_batch_size=2), OURS(momentum=1.0)))
    with pytest.warns(UserWarning, match="momentum=1.0"):
        _fit(model, _monitor(log_dir=str(tmp_path)))
    assert not _curves(tmp_path / "batch")
    assert len(_curves(tmp_path / "moving")) == 6


def test_distances(tmp_path):
    layer = KERAS(momentum=0.5)
    model = compiled(model_of(layer))
    _fit(model, _monitor(log_dir=str(tmp_path), every=100))
    curves = _curves(tmp_path / "moving")
    mean, variance = X[:4].mean(0), X[:4].var(0) + layer.epsilon
    right = np.sqrt(np.mean((mean - mean / 2) ** 2 / variance))
    found = curves[f"{layer.path}/mean_distance"][1]
    assert found == pytest.approx(right, 1e-5)
    right = np.log((0.5 + X[:4].var(0) / 2 + layer.epsilon) / variance)
    found = curves[f"{layer.path}/variance_log_ratio"][1]
    assert found == pytest.approx(np.sqrt(np.mean(right**2)), 1e-5)
    right = X[:4].mean(0).mean() / 2
    assert curves[f"{layer.path}/mean"][1] == pytest.approx(right)


def test_curves_go_on(tmp_path):
    model = compiled(model_of(KERAS(name="first")))
    for _ in range(2):
        _fit(model, _monitor(log_dir=str(tmp_path), every=100))
    (tag,) = (t for t in _curves(tmp_path / "batch") if t.endswith("mean"))
    assert list(_curves(tmp_path / "batch")[tag]) == [1, 9]


def test_what_was_drawn_before_an_error_is_kept(tmp_path):
    model = compiled(InInference(KERAS()))
    monitor = _monitor(log_dir=str(tmp_path), on_stale="raise")
    with pytest.raises(RuntimeError):
        _fit(model, monitor)
    assert _curves(tmp_path / "moving")


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"on_stale": "ignore"}, "on_stale='ignore'"),
    ],
)
def test_bad_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        _monitor(**wrong)


def test_no_batch_normalization():
    with pytest.raises(ValueError, match="`StatisticsMonitor` found no batch"):
        _fit(compiled(model_of()), _monitor())


def test_without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        _monitor(log_dir=str(tmp_path))
    _monitor()


@pytest.mark.slow
def test_cost(tmp_path, monkeypatch):
    """Less than 2% of a step of condition 9, by CPU time.

    What its methods take is counted, and not what `fit` takes with it and
    without: two fits differ by more than that.
    """
    model = models.build(article.condition(9))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    monitor = keras_bn.StatisticsMonitor(log_dir=str(tmp_path))
    spent = []

    def timed(method):
        def call(*args, **kwargs):
            # Of this thread alone: on JAX the others are still in a step.
            began = time.thread_time()
            method(*args, **kwargs)
            spent.append(time.thread_time() - began)

        return call

    for name in (
        "on_epoch_begin",
        "on_train_batch_begin",
        "on_epoch_end",
    ):
        monkeypatch.setattr(monitor, name, timed(getattr(monitor, name)))
    rng = np.random.default_rng(0)
    steps, size = 100, article.BATCH_SIZE
    images = rng.standard_normal((steps * size, 32, 32, 3), "float32")
    labels = rng.integers(0, 10, steps * size)
    few = slice(4 * size)
    settings = {"batch_size": size, "callbacks": [monitor], "verbose": 0}
    # The first two epochs compile, and import what writes curves.
    model.fit(images[few], labels[few], epochs=2, **settings)
    spent.clear()
    began = time.process_time()
    model.fit(images, labels, **settings)
    step = (time.process_time() - began) / steps
    share = sum(spent) / steps / step
    print(f"\n{100 * share:.2f}% of a step of {1e3 * step:.0f} ms of CPU")
    assert share < 0.02

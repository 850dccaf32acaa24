"""The loop on a device, on the CPU, beside Keras's `train_on_batch`."""

import dataclasses

import keras
import numpy as np
import pytest

from experiments import Stopped
from experiments import data
from experiments import device_loop
from experiments import distribution
from experiments import evaluation
from experiments import machine
from experiments import run_folder
from experiments import run_model
from experiments import train
from experiments import training
from experiments.distribution.workers import Workers
from experiments.run_settings import Settings
from experiments.studies import study_layers

# Condition 11 has all there is: moving statistics and dropout's generator.
_SETTINGS = Settings(
    11, steps=5, eval_every=3, batch_size=4, shuffle=True, input="standardized"
)
# A GPU gets XLA from TensorFlow as well.
_XLA = [False, True] if keras.backend.backend() == "tensorflow" else [False]


@pytest.fixture(scope="module")
def few():
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:12],
        train_labels=digits.train_labels[:12],
        test_images=digits.test_images[:10],
        test_labels=digits.test_labels[:10],
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few steps a call, and a last batch of test images that is smaller."""
    monkeypatch.setattr(device_loop, "_MOST_STEPS", 2)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)


def _begin(workers, xla):
    model = run_model.build(_SETTINGS)
    if xla:
        model.jit_compile = True
    workers.start(model, lambda: None)
    return model


def test_it_trains_where_the_device_is_no_cpu(monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: "CPU:0")
    assert type(distribution.one_device()) is Workers
    monkeypatch.setattr(machine, "device", lambda: "GPU:0, NVIDIA H100")
    loop = distribution.one_device()
    assert isinstance(loop, device_loop.DeviceLoop)
    assert keras.backend.backend() in type(loop).__name__.lower()


@pytest.mark.parametrize("xla", _XLA)
def test_steps_and_evaluation_are_those_of_keras(few, xla):
    batches = data.Batches(few, 4, "standardized", shuffle=True, seed=0)
    images = batches.prepare(few.test_images)
    found = []
    for workers in (Workers(), device_loop.of_backend()):
        model, reports = _begin(workers, xla), []
        # Two epochs: each has its own order.
        while len(reports) < 5:
            reports += workers.take_steps(batches, len(reports), 5)
        workers.collect()
        tested = workers.evaluate(images, few.test_labels)
        statistics = [
            keras.ops.convert_to_numpy(x)
            for x in model.non_trainable_variables
            if "moving" in x.name
        ]
        states = [
            keras.ops.convert_to_numpy(x.seed_generator.state)
            for x in model.layers
            if hasattr(x, "seed_generator")
        ]
        assert int(model.optimizer.iterations) == 5
        found.append((reports, tested, statistics, states))
    (keras_reports, keras_test, *keras_state), (reports, test, *state) = found
    for expected, report in zip(keras_reports, reports, strict=True):
        assert report == pytest.approx(expected, rel=2e-3)
    assert test == pytest.approx(keras_test, rel=2e-2)
    np.testing.assert_array_equal(state[1], keras_state[1])
    for expected, value in zip(keras_state[0], state[0], strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-2, atol=2e-3)


def test_what_layers_add_to_the_loss_is_trained_on(few):
    """A penalty in training alone, and a regularizer, in test too."""
    batches = data.Batches(few, 4, "standardized", shuffle=False, seed=0)
    images = batches.prepare(few.test_images)
    found = []
    for workers in (Workers(), device_loop.of_backend()):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(images.shape[1:]),
                keras.layers.Flatten(),
                study_layers.MomentsPenalty(10.0),
                keras.layers.Dense(10, kernel_regularizer="l2"),
            ]
        )
        model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        workers.start(model, lambda: None)
        reports = workers.take_steps(batches, 0, 1)
        reports += workers.take_steps(batches, 1, 2)
        workers.collect()
        tested = workers.evaluate(images, few.test_labels)
        found.append((reports, tested, model.get_weights()))
    (keras_reports, keras_test, keras_weights), (reports, test, weights) = found
    for expected, report in zip(keras_reports, reports, strict=True):
        assert report == pytest.approx(expected, rel=1e-4)
    assert test == pytest.approx(keras_test, rel=1e-4)
    for expected, value in zip(keras_weights, weights, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_a_killed_run_is_the_undisturbed_run(few, tmp_path, monkeypatch):
    """However many steps a call has, before and after."""
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SPACING", 0)
    runs, loop = {}, device_loop.of_backend
    for name, seconds in (("one", 0.0), ("parts", 1e9)):
        monkeypatch.setattr(device_loop, "_CALL_SECONDS", seconds)
        calls = []

        def kill(steps):
            calls.append(steps)
            if name == "parts" and sum(calls) == 5:
                raise KeyboardInterrupt

        if name == "parts":
            with pytest.raises(KeyboardInterrupt, match="goes on from step 3"):
                train.run(_SETTINGS, few, tmp_path / name, kill, loop())
            # The first call is alone, for it compiles.
            assert calls == [0, 1, 2, 2]
        train.run(_SETTINGS, few, tmp_path / name, workers=loop())
        folder = _SETTINGS.folder(tmp_path / name)
        runs[name] = (folder / "metrics.jsonl").read_bytes()
    assert runs["one"] == runs["parts"]


def test_a_run_that_is_told_to_stop_keeps_the_step_in_hand(
    few, tmp_path, monkeypatch
):
    monkeypatch.setattr(device_loop, "_CALL_SECONDS", 0.0)
    loop, taken = device_loop.of_backend, []
    train.run(_SETTINGS, few, tmp_path / "undisturbed", workers=loop())

    def stop():
        if sum(taken) == 4:
            raise Stopped

    with monkeypatch.context() as told:
        told.setattr(training, "raise_if_interrupted", stop)
        with pytest.raises(KeyboardInterrupt, match="goes on from step 4"):
            train.run(
                _SETTINGS, few, tmp_path / "stopped", taken.append, loop()
            )
    train.run(_SETTINGS, few, tmp_path / "stopped", workers=loop())
    undisturbed, stopped = (
        (_SETTINGS.folder(tmp_path / x) / "metrics.jsonl").read_bytes()
        for x in ("undisturbed", "stopped")
    )
    assert stopped == undisturbed

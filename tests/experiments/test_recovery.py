"""Runs that are killed, stopped or out of room, and go on.

`kill -9` leaves what a run's folder holds at that moment. So the folder is
copied at moments of an undisturbed run, and each copy is gone on from.
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import experiments
from experiments import ExperimentError
from experiments import atomic
from experiments import checkpoint
from experiments import data
from experiments import run_folder
from experiments import run_model
from experiments import train
from experiments.run_settings import Settings
from tests.waiting import LIMIT
from tests.waiting import wait_until

_ROOT = Path(__file__).parents[2]
_CONDITIONS = (9, 11)
_MOMENTS = 10  # of each condition


@pytest.fixture(scope="module")
def few():
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:20],
        train_labels=digits.train_labels[:20],
        test_images=digits.test_images[:10],
        test_labels=digits.test_labels[:10],
    )


def _settings(condition):
    return Settings(condition, steps=5, eval_every=2, batch_size=4)


@pytest.fixture(autouse=True, scope="module")
def _compiled_once():
    """Gives a run a model that an earlier one compiled, at its first state."""
    build, made = run_model.build, {}

    def begun(settings):
        if settings not in made:
            model = build(settings)
            values = [
                np.array(keras.ops.convert_to_numpy(variable))
                for variable in checkpoint.state(model)
            ]
            made[settings] = model, values
        model, values = made[settings]
        for variable, value in zip(checkpoint.state(model), values):
            variable.assign(value)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_model, "build", begun)
        yield


@pytest.fixture(autouse=True)
def _a_checkpoint_with_every_line(monkeypatch):
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SPACING", 0)


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    """From each condition to the folder of its run."""
    output = tmp_path_factory.mktemp("undisturbed")
    for condition in _CONDITIONS:
        train.run(_settings(condition), few, output)
    return {x: _settings(x).folder(output) for x in _CONDITIONS}


_on_event = None


def _hear(event, arguments):
    if _on_event and event in ("open", "os.rename", "os.remove", "os.mkdir"):
        _on_event(event, str(arguments[0]))


# It cannot be taken away again.
sys.addaudithook(_hear)


class _Torn:
    """A file of which half of each write is on the disk for a moment."""

    def __init__(self, file, at_half):
        self._file = file
        self._at_half = at_half

    def write(self, values):
        view = memoryview(values).cast("B")
        half = len(view) // 2
        self._file.write(view[:half])
        self._file.flush()
        self._at_half()
        self._file.write(view[half:])
        return len(view)

    def __getattr__(self, name):
        return getattr(self._file, name)


def _run(settings, few, output, at_moment):
    """Trains; `at_moment` gets the number and the kind of each moment."""
    global _on_event
    count = 0

    def moment(kind):
        nonlocal count
        global _on_event
        hear, _on_event = _on_event, None
        at_moment(count, kind)
        _on_event = hear
        count += 1

    savez = np.savez
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            np,
            "savez",
            lambda file, **arrays: savez(
                _Torn(file, lambda: moment("write")), **arrays
            ),
        )
        patch.setattr(atomic, "to_disk", lambda file: moment("to disk"))
        patch.setattr(atomic, "check_folder", lambda path: None)
        _on_event = lambda kind, path: (  # noqa: E731
            moment(kind) if path.startswith(str(output)) else None
        )
        try:
            return train.run(
                settings, few, output, lambda steps: moment("step")
            )
        finally:
            _on_event = None


def _copy(folder, to):
    """Copies a folder; checkpoints, which nobody changes, by a link."""
    to.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, to / path.name)
        elif path.name in ("checkpoint.npz", "previous.checkpoint.npz"):
            os.link(path, to / path.name)
        else:
            shutil.copy(path, to / path.name)


@pytest.mark.parametrize("condition", _CONDITIONS)
def test_a_killed_run_is_the_undisturbed_run(
    condition, few, undisturbed, tmp_path
):
    settings = _settings(condition)
    kinds = []
    _run(settings, few, tmp_path / "counted", lambda _, x: kinds.append(x))
    shutil.rmtree(tmp_path / "counted")
    # In the middle of writing a checkpoint, and at all other moments.
    chosen = set()
    numbers = random.Random(condition)
    for writing in (True, False):
        places = [i for i, x in enumerate(kinds) if writing == (x == "write")]
        chosen |= set(numbers.sample(places, _MOMENTS // 2))
    source = settings.folder(tmp_path / "copied")

    def copy(number, kind):
        if number in chosen and source.exists():
            _copy(source, settings.folder(tmp_path / f"{number}"))

    _run(settings, few, tmp_path / "copied", copy)
    expected = {
        name: (undisturbed[condition] / name).read_bytes()
        for name in ("metrics.jsonl", "run.json")
    }
    resumed = [x for x in tmp_path.iterdir() if x.name != "copied"]
    assert len(resumed) >= _MOMENTS - 1
    for output in resumed:
        train.run(settings, few, output)
        folder = settings.folder(output)
        for name, content in expected.items():
            assert (folder / name).read_bytes() == content, output.name
        assert sorted(os.listdir(folder)) == sorted(
            os.listdir(undisturbed[condition])
        )
        shutil.rmtree(output)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_a_stopped_run_goes_on_from_its_step(
    steps, few, undisturbed, tmp_path, monkeypatch
):
    done, settings = 0, _settings(11)

    def stop(new):
        nonlocal done
        done += new
        if done == steps:
            monkeypatch.setattr(experiments, "_interruptions", [15])

    with pytest.raises(KeyboardInterrupt) as stopped:
        train.run(settings, few, tmp_path, stop)
    said = f"stopped after step {steps}; the same command goes on from step"
    assert str(stopped.value).endswith(f"{said} {steps}")
    monkeypatch.setattr(experiments, "_interruptions", [])
    left = []
    train.run(settings, few, tmp_path, left.append)
    assert left == [steps] + [1] * (5 - steps)
    found = settings.folder(tmp_path) / "metrics.jsonl"
    assert found.read_bytes() == (
        (undisturbed[11] / "metrics.jsonl").read_bytes()
    )


@pytest.mark.parametrize("writes", [0, 60])
def test_a_run_goes_on_when_there_is_room(
    writes, few, undisturbed, tmp_path, monkeypatch
):
    settings = _settings(9)

    def fill(number, kind):
        nonlocal writes
        if kind == "write":
            if not writes:
                raise OSError(28, "No space left on device")
            writes -= 1

    with pytest.raises(ExperimentError) as error:
        _run(settings, few, tmp_path, fill)
    assert str(error.value) == (
        f"cannot write to {settings.folder(tmp_path)} (No space left on "
        "device): make room, or give another output"
    )
    train.run(settings, few, tmp_path)
    found = settings.folder(tmp_path) / "metrics.jsonl"
    assert (
        found.read_bytes() == (undisturbed[9] / "metrics.jsonl").read_bytes()
    )


def _start(output):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.train",
            "--dataset=digits",
            "--condition=11",
            "--batch_size=4",
            "--steps=24",
            "--eval_every=4",
            f"--output={output}",
        ],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_are_killed(tmp_path):
    """One with SIGKILL, one with SIGTERM; meanwhile a second has no lock."""
    settings = Settings(11, batch_size=4, steps=24, eval_every=4)
    metrics = settings.folder(tmp_path) / "metrics.jsonl"
    for number in (signal.SIGKILL, signal.SIGTERM):
        size = metrics.stat().st_size if metrics.exists() else 0
        process = _start(tmp_path)
        try:
            wait_until(
                lambda size=size: (
                    metrics.exists() and metrics.stat().st_size > size
                ),
                process,
            )
            if number == signal.SIGTERM:
                with pytest.raises(run_folder.BusyError):
                    train.run(settings, data.load("digits"), tmp_path)
            process.send_signal(number)
            _, errors = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == {9: -9, 15: 143}[number], errors
    stopped = errors.splitlines()[-1]
    step = stopped.split("stopped after step ")[1].split(";")[0]
    assert stopped.endswith(f"the same command goes on from step {step}")
    digits = data.load("digits")
    assert train.run(settings, digits, tmp_path) == train.run(
        settings, digits, tmp_path / "undisturbed"
    )

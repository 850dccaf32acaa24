"""Whenever the power fails, a file is the old one or the new one, whole."""

import io
import json
import os
import zipfile

import keras
import numpy as np
import pytest

from experiments import atomic
from experiments import checkpoint
from experiments import run_folder
from experiments.checkpoint import Position
from keras_bn.serving.publishing import publish
from tests.fake_disk import disk  # noqa: F401 - a fixture

_RUN = {
    "condition": 0,
    "seed": 0,
    "dataset": "digits",
    "steps": 3,
    "device": "a device",
    "processor": "a processor",
    "cores": 2,
    "packages": {"keras": "3"},
    "revision": "one",
}


def _write_text(path, content):
    atomic.write_text(path, content.decode())


def _replace(path, content):
    with atomic.replacing(path) as incomplete:
        incomplete.write_bytes(content)


@pytest.mark.parametrize("write", [_write_text, _replace])
def test_a_file_is_the_old_or_the_new_one(write, tmp_path, disk):  # noqa: F811
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"other")
    kept = disk()

    def check(files):
        assert files["file"] in (b"old", b"new")
        assert files["other"] == b"other"

    with kept.watching(check):
        write(tmp_path / "file", b"new")
    assert kept.left() == [{"file": b"new", "other": b"other"}]


@pytest.mark.parametrize("write", [_write_text, _replace])
def test_new_folders_outlive_the_power(write, tmp_path, disk):  # noqa: F811
    kept = disk()

    def check(files):
        assert files.get("a/b/file", b"new") == b"new"

    with kept.watching(check):
        write(tmp_path / "a" / "b" / "file", b"new")
    assert kept.left() == [{"a/b/file": b"new"}]


def _model():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.BatchNormalization()]
    )
    model.compile(optimizer="sgd", loss="mse")
    return model


def _position(content):
    """Returns where a run goes on from a checkpoint, which must be whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert file.testzip() is None
    with np.load(io.BytesIO(content)) as saved:
        return json.loads(str(saved["about"]))


def _newest(files, folder=""):
    """Returns the newest checkpoint's content, as `checkpoint.newest` does."""
    names = (f"{folder}checkpoint.npz", f"{folder}previous.checkpoint.npz")
    return next((files[name] for name in names if name in files), None)


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path, disk):  # noqa: F811
    path, model = tmp_path / "checkpoint.npz", _model()
    checkpoint.save(path, model, Position(1, 1), _RUN)
    kept = disk()
    for step in (2, 3, 4):

        def check(files, step=step):
            assert _position(_newest(files))["step"] in (step - 1, step)

        with kept.watching(check):
            checkpoint.save(path, model, Position(step, step), _RUN)
        (files,) = kept.left()
        assert sorted(files) == ["checkpoint.npz", "previous.checkpoint.npz"]
        for name, saved in zip(sorted(files), (step, step - 1)):
            assert _position(files[name])["step"] == saved


def test_a_disk_that_fails_late_leaves_both_checkpoints(tmp_path, monkeypatch):
    """The disk may take the bytes first, and be full when they are flushed."""
    path, model = tmp_path / "checkpoint.npz", _model()
    for step in (1, 2):
        checkpoint.save(path, model, Position(step, step), _RUN)
    before = {x: x.read_bytes() for x in tmp_path.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, model, Position(3, 3), _RUN)
    assert {x: x.read_bytes() for x in tmp_path.iterdir()} == before


def _steps(content):
    return [json.loads(line)["step"] for line in content.splitlines()]


def test_a_run_goes_on_or_is_finished(tmp_path, disk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SPACING", 0)
    # Its thread writes what no run goes on from.
    monkeypatch.setattr(run_folder, "_tensorboard", lambda *given: None)
    model, kept = _model(), disk()
    folder = run_folder.RunFolder(tmp_path / "9" / "0", _RUN)
    whole, begun = [1, 2, 3], False

    def check(files):
        here = {
            name.removeprefix("9/0/"): content
            for name, content in files.items()
        }
        newest, weights = _newest(here), here.get("final.weights.h5")
        assert newest or weights or not begun
        if newest or weights or "metrics.jsonl" in here:
            assert json.loads(here["run.json"]) == _RUN
        recorded = _position(newest)["recorded"] if newest else 0
        if weights is not None:
            # The file of HDF5 says itself how long it is.
            assert len(weights) == len(whole_weights)
            recorded = 3
        for name in ("metrics.jsonl", "timing.jsonl"):
            if recorded:
                found = _steps(here[name])
                assert found[:recorded] == whole[:recorded]

    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    network.save_weights(tmp_path / "any.weights.h5")
    whole_weights = (tmp_path / "any.weights.h5").read_bytes()
    with kept.watching(check), folder.locked():
        folder.resume(model)
        for step in whole:
            timing = dict.fromkeys(
                ("train_seconds", "eval_seconds", "images_per_second"), 1.0
            )
            folder.record(
                {"step": step, "test_accuracy": 0.5},
                {"step": step, **timing},
                model,
            )
            begun = True
            if step < 3:
                newest = {_newest(x, "9/0/") for x in kept.left()}
                assert {_position(x)["step"] for x in newest} == {step}
            # The last line has no checkpoint of its own.
            folder._next_checkpoint = 1e300 if step == 2 else 0.0
        folder.finish(network)
        folder.close()
    for files in kept.left():
        assert "9/0/final.weights.h5" in files


@pytest.mark.parametrize("new", [True, False])
def test_a_version_is_whole_or_not_there(new, tmp_path, disk):  # noqa: F811
    directory = tmp_path / "a" / "models"
    if not new:
        publish(directory, None, lambda folder: None)
    kept = disk()
    name = "a/models/1" if new else "a/models/2"
    whole = {f"{name}/model": b"whole", f"{name}/assets/labels": b"cat\n"}

    def fill(folder):
        (folder / "model").write_bytes(b"whole")
        (folder / "assets").mkdir()
        (folder / "assets" / "labels").write_bytes(b"cat\n")

    def visible(files):
        return {x: y for x, y in files.items() if x.startswith(name)}

    def check(files):
        assert visible(files) in ({}, whole)

    with kept.watching(check):
        publish(directory, None, fill)
    # What is hidden, such as the file of a lock, may be there or not.
    for files in kept.left():
        assert visible(files) == whole

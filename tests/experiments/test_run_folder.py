"""Checkpoints, and a run's folder."""

import json
import os
import sys

import keras
import numpy as np
import pytest

from experiments import ExperimentError
from experiments import result_files
from experiments import run_folder


def _model(seed=0):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(
                3,
                kernel_initializer=keras.initializers.GlorotUniform(seed),
            ),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=seed, name="dropout"),
        ]
    )
    model.compile(optimizer="adam", loss="mse")
    return model


def _values(model):
    return [
        keras.ops.convert_to_numpy(variable)
        for variable in [*model.variables, *model.optimizer.variables]
    ]


def _train(model):
    random = np.random.default_rng(0)
    model.train_on_batch(
        random.normal(size=(5, 4)).astype("float32"),
        random.normal(size=(5, 3)).astype("float32"),
    )


def test_a_checkpoint_holds_all_state(tmp_path):
    model = _model()
    generator = model.get_layer("dropout").seed_generator
    begun = keras.ops.convert_to_numpy(generator.state).tolist()
    _train(model)
    # A .keras file lacks this one; without it other units would be dropped.
    drawn = keras.ops.convert_to_numpy(generator.state).tolist()
    assert drawn != begun
    run_folder.save(tmp_path / "checkpoint.npz", model, 1)

    other = _model(seed=5)
    assert run_folder.restore(tmp_path / "checkpoint.npz", other) == 1
    state = other.get_layer("dropout").seed_generator.state
    assert keras.ops.convert_to_numpy(state).tolist() == drawn
    assert int(other.optimizer.iterations) == 1
    for step in range(2):
        for one, another in zip(_values(model), _values(other), strict=True):
            np.testing.assert_array_equal(one, another)
        _train(model)
        _train(other)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = _model()
    path = tmp_path / "checkpoint.npz"
    run_folder.save(path, model, 3)

    def half(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError):
        run_folder.save(path, model, 4)
    assert os.listdir(tmp_path) == ["checkpoint.npz"]
    assert run_folder.restore(path, model) == 3


def test_a_corrupt_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.npz"
    run_folder.save(path, _model(), 3)
    os.truncate(path, 1000)
    with pytest.raises(ExperimentError, match=f"{path} cannot be read"):
        run_folder.restore(path, _model())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    run_folder.save(path, _model(), 3)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    other.compile(optimizer="adam", loss="mse")
    with pytest.raises(ExperimentError, match=f"{path} cannot be read"):
        run_folder.restore(path, other)


def _description(**changes):
    return {
        "condition": 0,
        "seed": 0,
        "dataset": "digits",
        "steps": 5,
        "device": "a device",
        "packages": {"keras": "3"},
        "revision": "one",
        **changes,
    }


def _facts(folder):
    return json.loads((folder / "run.json").read_text())


def test_other_circumstances_may_continue_and_are_said(tmp_path):
    for revision in ("one", "one", "two", "two"):
        description = _description(revision=revision)
        folder = run_folder.RunFolder(tmp_path, description)
        assert folder.resume(_model()) == 0
        folder.close()
    continued = {name: description[name] for name in result_files.CIRCUMSTANCES}
    assert _facts(tmp_path) == {**_description(), "continued_by": [continued]}


def test_a_folder_of_another_run_is_refused_untouched(tmp_path):
    folder = run_folder.RunFolder(tmp_path, _description())
    folder.resume(_model())
    folder.close()
    with pytest.raises(ExperimentError, match="steps=5 there, 6 now") as error:
        run_folder.RunFolder(tmp_path, _description(steps=6))
    assert "another output, or delete the folder" in str(error.value)
    assert _facts(tmp_path) == _description()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", ", line 1: not JSON"),
        (b"[1]", ", line 1: not a JSON object"),
        (b"[]", ", line 1: not a JSON object"),
        (b"null", ", line 1: not a JSON object"),
        (b"\xff", ", line 1: not UTF-8 text"),
        (b"{}", ": condition is missing"),
    ],
)
def test_a_corrupt_run_json_is_named(content, said, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ExperimentError, match=f"run.json{said}"):
        run_folder.RunFolder(tmp_path, _description())


@pytest.mark.parametrize(
    "name", ["final.weights.h5", "checkpoint.npz", "metrics.jsonl"]
)
def test_a_folder_that_lacks_run_json_is_refused(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(ExperimentError, match=f"{name} but no run.json"):
        run_folder.RunFolder(tmp_path, _description())
    assert os.listdir(tmp_path) == [name]


def _metrics(step):
    return {"step": step, "test_accuracy": 0.5}


def _timing(step):
    return {"step": step, "train_seconds": 1.0, "images_per_second": 9.0}


@pytest.fixture
def interrupted(tmp_path):
    """A folder whose run was interrupted after step 4 of 5."""
    folder, model = run_folder.RunFolder(tmp_path, _description()), _model()
    folder.resume(model)
    for step in (2, 4):
        folder.record(_metrics(step), _timing(step), model)
    folder.close()
    return tmp_path


def _resume(path):
    folder = run_folder.RunFolder(path, _description())
    step = folder.resume(_model())
    folder.close()
    return step, [line["step"] for line in folder.metrics()]


def test_a_torn_last_line_alone_is_dropped(interrupted):
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "test')
    assert _resume(interrupted) == (4, [2, 4])


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: ["{\n", *lines[1:]], ", line 1: not JSON"),
        (lambda lines: [lines[0], "{}\n"], "line 2: step is missing"),
        (lambda lines: lines[:1], "has no line of step 4"),
        (lambda lines: [], "has no line of step 4"),
    ],
)
def test_damaged_lines_are_no_ground_to_go_on(name, change, said, interrupted):
    path = interrupted / name
    path.write_text("".join(change(path.read_text().splitlines(True))))
    before = path.read_bytes()
    with pytest.raises(ExperimentError, match=f"{name}.*{said}"):
        _resume(interrupted)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "ends at step 0"),
        (b"", "ends at step 0"),
        (b'{"step": 4, "test_accuracy": 0.5}\n', "ends at step 4"),
        (b'{"step": 5, "test', "line 1: cut short"),
        (b'{"step": "5", "test_accuracy": 0.5}\n', "step is not one of"),
        (b'{"step": 5}\n', "test_accuracy is missing"),
        (b"\xff\n", "not UTF-8 text"),
        ("folder", "Is a directory"),
    ],
)
def test_a_finished_run_has_its_last_line(content, said, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(_description()))
    (tmp_path / "final.weights.h5").write_text("")
    path = tmp_path / "metrics.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=said) as error:
        run_folder.RunFolder(tmp_path, _description())
    assert str(path) in str(error.value)


def test_making_the_object_writes_nothing(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "9" / "0", _description())
    assert not folder.finished
    assert folder.metrics() == []
    assert os.listdir(tmp_path) == []


def test_without_tensorboard_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    folder, model = run_folder.RunFolder(tmp_path, _description()), _model()
    folder.resume(model)
    folder.record(_metrics(1), _timing(1), model)
    folder.close()
    assert folder.metrics() == [_metrics(1)]
    assert capsys.readouterr().err == "TensorBoard is absent: no logs for it\n"
    assert not (tmp_path / "tensorboard").exists()

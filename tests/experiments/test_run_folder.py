"""A run's folder."""

import json
import os
import sys

import keras
import pytest

from experiments import ExperimentError
from experiments import run_folder
from experiments import same_settings
from experiments.checkpoint import Position
from tests import locks


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


def _description(**changes):
    return {
        "condition": 0,
        "seed": 0,
        "dataset": "digits",
        "steps": 5,
        "device": "a device",
        "processor": "a processor",
        "cores": 2,
        "onednn": True,
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
        assert folder.resume(_model()) == Position(0, 0)
        folder.close()
    continued = {
        name: description[name] for name in same_settings.CIRCUMSTANCES
    }
    continued["step"] = 0
    assert _facts(tmp_path) == {**_description(), "continued_by": [continued]}


@pytest.mark.parametrize(("before", "after"), [("on", "off"), ("off", "on")])
def test_a_run_says_that_it_goes_on_with_other_rounding(
    before, after, tmp_path, capsys
):
    model = _model()
    begun = run_folder.RunFolder(tmp_path, _description(onednn=before == "on"))
    begun.resume(model)
    begun.record(_metrics(2), _timing(2), model)
    begun.close()
    assert not capsys.readouterr().err
    going_on = _description(onednn=after == "on")
    folder = run_folder.RunFolder(tmp_path, going_on)
    assert folder.resume(model).step == 2
    folder.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"oneDNN {before} to step 2" in said
    assert f"goes on with oneDNN {after}" in said
    (segment,) = _facts(tmp_path)["continued_by"]
    assert segment["step"] == 2
    assert segment["onednn"] == (after == "on")


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
    return {
        "step": step,
        "train_seconds": 1.0,
        "eval_seconds": 1.0,
        "images_per_second": 9.0,
    }


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A folder whose run was interrupted after step 4 of 5."""
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SPACING", 0)
    folder, model = run_folder.RunFolder(tmp_path, _description()), _model()
    folder.resume(model)
    for step in (2, 4):
        folder.record(_metrics(step), _timing(step), model)
    folder.close()
    return tmp_path


def _resume(path):
    folder = run_folder.RunFolder(path, _description())
    position = folder.resume(_model())
    folder.close()
    return position.step, [line["step"] for line in folder.metrics()]


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)

    def save(path, model, position, description):
        nonlocal now
        now += 2.0

    monkeypatch.setattr(run_folder.checkpoint, "save", save)
    description, model = _description(steps=200), _model()
    folder = run_folder.RunFolder(tmp_path, description)
    folder.resume(model)
    saved = []
    for step in range(1, 200):
        now += 1.0
        folder.record(_metrics(step), _timing(step), model)
        saved.append(folder.saved)
    assert sorted(set(saved)) == [1, 101]
    assert len(folder.metrics()) == 199


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    first, second = (
        run_folder.RunFolder(tmp_path / "9", _description()) for _ in range(2)
    )
    with first.locked():
        with pytest.raises(run_folder.BusyError) as error:
            with second.locked():
                pass
        assert str(error.value).startswith(
            f"another process trains {tmp_path / '9'}: wait"
        )
        first.resume(_model())
        first.close()
    assert not (tmp_path / "9" / "lock").exists()
    with second.locked():
        pass
    # What another process has done since is seen when it ends.
    other = run_folder.RunFolder(tmp_path / "10", _description())
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "run.json").write_text(json.dumps(_description(steps=6)))
    with pytest.raises(ExperimentError, match="steps=6 there, 5 now"):
        with other.locked():
            pass


def test_the_next_holder_of_a_lock_is_alone(tmp_path, monkeypatch):
    folder = run_folder.RunFolder(tmp_path / "9", _description())

    def train():
        with folder.locked():
            pass

    locks.check_that_next_holder_is_alone(monkeypatch, train)


def test_what_a_killed_process_was_writing_goes(interrupted):
    for name in ("incomplete.checkpoint.npz", ".metrics.jsonl.x1"):
        (interrupted / name).write_text("half")
    assert _resume(interrupted) == (4, [2, 4])
    assert sorted(os.listdir(interrupted)) == [
        "checkpoint.npz",
        "metrics.jsonl",
        "previous.checkpoint.npz",
        "run.json",
        "tensorboard",
        "timing.jsonl",
    ]


def test_the_checkpoint_before_is_gone_on_from(interrupted):
    (interrupted / "checkpoint.npz").write_bytes(b"PK")
    with pytest.raises(ExperimentError, match="delete it to go on"):
        _resume(interrupted)
    (interrupted / "checkpoint.npz").unlink()
    assert _resume(interrupted) == (2, [2])


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

"""The pitfall's program: every arm trained, examined, and not twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tqdm

import keras_bn
from experiments import ExperimentError
from experiments import child_process
from experiments import data
from experiments import pitfall_arms
from experiments import pitfall_child
from experiments import pitfall_examination
from experiments import pitfall_figures
from experiments import progress
from experiments import run_model
from experiments import train
from experiments import update_ops_pitfall
from experiments.run_settings import Settings
from tests.waiting import LIMIT

_ROOT = Path(__file__).parents[2]
_BACKEND = keras.backend.backend()
# Forms that each backend's environment can train. Form e trains anywhere, and
# costs least where nothing is compiled.
_FORMS = {"tensorflow": "ac", "jax": "b", "torch": "de"}[_BACKEND]
_LOOPS = {
    "tensorflow": ("c_inference", "c_training"),
    "jax": ("b_dropped", "b_kept"),
    "torch": ("d_inference", "d_training"),
}[_BACKEND]
_SETTINGS = Settings(9, steps=3, eval_every=2)
_AT_INITIAL_VALUES = ("a_without", "b_dropped", "c_inference", "d_inference")


@pytest.fixture(scope="module")
def few():
    """A batch of digits: one shape of inputs to compile for."""
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:128],
        train_labels=digits.train_labels[:128],
        test_images=digits.test_images[:50],
        test_labels=digits.test_labels[:50],
    )


def _run(letters, few, output):
    forms = pitfall_arms.parse(list(letters))
    return update_ops_pitfall.run(forms, _SETTINGS, few, output)


@pytest.fixture(scope="module")
def results(few, tmp_path_factory):
    output = tmp_path_factory.mktemp("pitfall")
    return output, _run(_FORMS, few, output)


def _model(output, name):
    return keras.models.load_model(output / "models" / f"{name}.keras")


def test_every_arm_is_trained_and_examined(results):
    output, lines = results
    arms = [arm for form in _FORMS for arm in pitfall_arms.FORMS[form].arms]
    assert [line["arm"] for line in lines] == [arm.name for arm in arms]
    written = (output / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines
    for line, arm in zip(lines, arms):
        assert (line["form"], line["title"]) == (arm.form, arm.title)
        assert line["right"] == arm.right
        assert line["packages"]["keras"] == keras.__version__
        assert line["backend"] == _BACKEND
        for name in ("test_accuracy", "test_accuracy_recalibrated"):
            assert 50 * line[name] == pytest.approx(round(50 * line[name]))
        layers = [one["layer"] for one in line["recalibrated"]]
        assert layers == [one["layer"] for one in line["statistics"]]
        assert len(layers) == 3


def test_wrong_arms_keep_the_initial_statistics(results):
    _, lines = results
    for line in lines:
        initial = [
            one["moving_mean"] == [0, 0, 0]
            and one["moving_variance"] == [1] * 3
            for one in line["statistics"]
        ]
        assert initial == 3 * [line["arm"] in _AT_INITIAL_VALUES]
        found = line["audit"]["without_data"]["findings"]
        accused = {x["layer"] for x in found if "initial values" in x["what"]}
        if line["arm"] in _AT_INITIAL_VALUES:
            assert accused == {one["layer"] for one in line["statistics"]}
        else:
            assert all("share" in x["what"] for x in found), found


def test_loops_train_as_keras_does(results, few):
    output, _ = results
    wrong, right = (_model(output, name) for name in _LOOPS)
    batches = data.Batches(few, _SETTINGS.batch_size)
    for model, before in (
        (right, lambda model: None),
        # What the loops of TensorFlow and PyTorch come to. JAX's drops what
        # it learned of the data after normalizing with it.
        (wrong, (lambda x: None) if _BACKEND == "jax" else keras_bn.freeze),
    ):
        theirs = run_model.build(_SETTINGS)
        before(theirs)
        for step in range(_SETTINGS.steps):
            theirs.train_on_batch(*batches[step])
        for own, peer in zip(
            model.trainable_variables, theirs.trainable_variables
        ):
            own, peer = map(keras.ops.convert_to_numpy, (own, peer))
            # Adam moves a weight by up to 1e-3 a step.
            assert np.median(np.abs(own - peer)) < 1e-5
        if model is right:
            _assert_same_statistics(model, theirs)


def _assert_same_statistics(model, other):
    for own, peer in zip(
        model.non_trainable_variables, other.non_trainable_variables
    ):
        own, peer = map(keras.ops.convert_to_numpy, (own, peer))
        np.testing.assert_allclose(own, peer, rtol=2e-3, atol=2e-3)


def test_the_curve_of_both_statistics(results):
    output, lines = results
    path = output / "headline.jsonl"
    assert path.exists() == ("e" in _FORMS)
    if path.exists():
        texts = path.read_text().splitlines()
        curve = [json.loads(text) for text in texts]
        assert [line["step"] for line in curve] == [2, 3]
        for name in ("test_accuracy", "test_accuracy_recalibrated"):
            assert curve[-1][name] == lines[-1][name]
        # The evaluations on the way left no trace.
        _assert_same_statistics(
            _model(output, "e_enough"), _model(output, _LOOPS[1])
        )


def test_a_session_and_keras_agree(results):
    _, lines = results
    in_session = {
        line["arm"]: line["test_accuracy_in_session"]
        for line in lines
        if line["form"] == "a"
    }
    assert len(in_session) == (3 if "a" in _FORMS else 0)
    for line in lines:
        expected = in_session.get(line["arm"], line["test_accuracy"])
        assert line["test_accuracy"] == pytest.approx(expected)


def test_nothing_is_done_twice(results, few, monkeypatch):
    output, lines = results
    monkeypatch.setattr(child_process, "ask", None)
    assert _run(_FORMS, few, output) == lines


def test_a_trained_arm_is_examined_without_training(results, few):
    output, lines = results
    arm = _LOOPS[0]
    model = output / "models" / f"{arm}.keras"
    before = model.stat().st_mtime_ns
    kept = [json.dumps(x) + "\n" for x in lines if x["arm"] != arm]
    (output / "results.jsonl").write_text("".join(kept))
    assert _run(_FORMS, few, output) == lines
    assert model.stat().st_mtime_ns == before


def _program(*flags):
    return [
        sys.executable,
        "-m",
        "experiments.update_ops_pitfall",
        "--dataset=digits",
        *flags,
    ]


def test_the_program_from_flags_to_figures(results):
    output, lines = results
    done = subprocess.run(
        _program(
            f"--forms={','.join(_FORMS)}",
            "--steps=3",
            "--eval_every=2",
            f"--output={output}",
        ),
        cwd=_ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in lines:
        (row,) = (x for x in done.stdout.splitlines() if line["title"] in x)
        assert f"{line['test_accuracy']:.3f}" in row
        assert ("WRONG" in row) != line["right"]
    for name in ("headline", "forms") if "e" in _FORMS else ("forms",):
        for suffix in (".svg", ".png"):
            path = output / f"{name}{suffix}"
            assert str(path) in done.stdout
            assert path.stat().st_size


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--forms=a,x"], "forms are letters of a,b,c,d,e,f. Received: 'x'"),
        (["--forms="], "give forms"),
        (["--steps=0"], "Received: steps=0"),
        (["--output="], "output is the folder"),
        ([f"--output={__file__}/x"], "cannot write"),
    ],
)
def test_wrong_flags_are_one_line(flags, said):
    done = subprocess.run(
        _program(*flags), cwd=_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_an_interruption_says_how_to_go_on(few, tmp_path, monkeypatch):
    (form,) = pitfall_arms.parse([_FORMS[0]])
    said = []

    class Interrupted(tqdm.tqdm):
        def set_description(self, words):
            said.append(words)
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "bar", lambda *given, **_: Interrupted())
    with pytest.raises(KeyboardInterrupt) as interruption:
        update_ops_pitfall.run([form], _SETTINGS, few, tmp_path)
    first = f"form {form.letter}, {form.arms[0].title}"
    assert said == [first]
    assert str(interruption.value) == (
        f"stopped ({first}); the same command goes on with this arm"
    )


def test_an_interrupted_program_is_one_line(tmp_path):
    process = subprocess.Popen(
        _program("--steps=500", "--forms=e", f"--output={tmp_path}"),
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "digits" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 130
    last = said.splitlines()[-1]
    assert last.startswith("interrupted: ") and "the same command" in last


def test_forms_without_their_packages_are_left_out(monkeypatch):
    def find_spec(name):
        return None if name in ("tf_keras", "jax") else object()

    monkeypatch.setattr(pitfall_arms, "find_spec", find_spec)
    forms = pitfall_arms.parse(["a", "b", "c"])
    possible, left_out = update_ops_pitfall._split(forms)
    assert [form.letter for form in possible] == ["c"]
    assert left_out == [
        "left out: form a (TensorFlow 1, UPDATE_OPS) needs tf-keras, not "
        "installed here",
        "left out: form b (JAX, stateless_call) needs jax, not installed here",
    ]
    with pytest.raises(ExperimentError, match="form a .* form b"):
        update_ops_pitfall._split(forms[:2])


def test_results_of_other_settings_are_kept(results, few):
    output, _ = results
    facts = train.describe(dataclasses.replace(_SETTINGS, steps=4), few)
    before = (output / "run.json").read_bytes()
    with pytest.raises(ExperimentError, match="steps=3 there, 4 now"):
        update_ops_pitfall.open_folder(facts, output)
    assert (output / "run.json").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"form": "a"}'])
def test_damaged_results_are_one_line(text, few, tmp_path):
    facts = train.describe(_SETTINGS, few)
    assert update_ops_pitfall.open_folder(facts, tmp_path) == []
    (tmp_path / "results.jsonl").write_text(f'{{"arm": "b_kept"}}\n{text}\n')
    with pytest.raises(ExperimentError, match="results.jsonl, line 2: damaged"):
        update_ops_pitfall.open_folder(facts, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ExperimentError, match="no run.json"):
        update_ops_pitfall.open_folder(facts, tmp_path)


def test_a_failing_process_is_one_line(few, tmp_path, monkeypatch):
    monkeypatch.setattr(child_process.sys, "executable", "/bin/false")
    with pytest.raises(
        ExperimentError, match="failed: exit code 1: no message"
    ):
        _run("e", few, tmp_path)


def test_images_for_children_are_the_same(few, tmp_path):
    pitfall_child.write_images(few, tmp_path)
    read = pitfall_child.read_images(tmp_path)
    assert read.note == few.note
    np.testing.assert_array_equal(read.test_images, few.test_images)
    np.testing.assert_array_equal(read.train_labels, few.train_labels)


def test_a_refusal_is_kept_and_overruled(few, monkeypatch):
    asked = []

    def recalibrate(model, images, **arguments):
        asked.append(arguments.get("force", False))
        if not asked[-1]:
            raise ValueError("trained in inference")
        return keras_bn.diagnostics.recalibrate.Recalibration()

    monkeypatch.setattr(keras_bn, "recalibrate", recalibrate)
    facts = pitfall_examination.examine(run_model.network(_SETTINGS), few)
    assert asked == [False, True]
    assert facts["refusal"] == "trained in inference"


def test_figures_are_the_same_each_time(tmp_path):
    lines = [
        {
            "form": form,
            "title": f"arm {number}",
            "right": number % 2 == 1,
            "test_accuracy": 0.1 * number,
            "test_accuracy_recalibrated": 0.7,
            "refusal": "no" if number == 2 else None,
        }
        for number, form in enumerate("aabb")
    ]
    curve = [
        {
            "step": step,
            "test_accuracy": 0.5,
            "test_accuracy_recalibrated": 0.6,
        }
        for step in (50, 100)
    ]
    seen = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        paths = pitfall_figures.draw_forms(lines, 100, "digits", folder)
        paths += pitfall_figures.draw_headline(curve, "digits", folder)
        seen.append([path.read_bytes() for path in paths])
    assert seen[0] == seen[1]
    forms = seen[0][0].decode()
    assert forms.count("refused, forced here") == 1
    assert "100 steps of condition 9, digits" in forms

"""The grid of conditions and seeds."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import ExperimentError
from experiments import article
from experiments import data
from experiments import many_runs
from experiments import reproduce
from experiments import result_files
from experiments import run_folder
from experiments import train
from tests.experiments.run_files import write_run
from tests.waiting import LIMIT
from tests.waiting import wait_until

_ROOT = Path(__file__).parents[2]
_CIFAR10 = data.Dataset(None, None, None, None, "cifar10", "3.0.2", "any")


@pytest.fixture(scope="module")
def few():
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:8],
        train_labels=digits.train_labels[:8],
        test_images=digits.test_images[:10],
        test_labels=digits.test_labels[:10],
    )


def test_grid_has_every_condition_and_seed():
    runs = reproduce.grid((11, 0, 11), 2, steps=7, input="standardized")
    assert [(x.seed, x.condition) for x in runs] == [
        (0, 0),
        (0, 11),
        (1, 0),
        (1, 11),
    ]
    assert {(x.steps, x.input) for x in runs} == {(7, "standardized")}


@pytest.mark.parametrize(
    ("conditions", "seeds", "said"),
    [
        ((0, 12), 1, "condition=12"),
        ((0,), 0, "seeds=0"),
        ((), 1, "give conditions"),
    ],
)
def test_grids_that_do_not_exist(conditions, seeds, said):
    with pytest.raises(ExperimentError, match=said):
        reproduce.grid(conditions, seeds)


def test_presets():
    quick, full = reproduce.PRESETS["quick"], reproduce.PRESETS["article"]
    assert quick["conditions"] == (2, 11)
    # Moving averages of momentum 0.99 have left their start behind.
    assert 0.99 ** quick["steps"] < 0.01
    assert full["conditions"] == tuple(range(12))
    assert full["steps"] == 156_000
    assert full["steps"] // full["eval_every"] == 1_000
    # `train` without --steps does what `reproduce` does for a condition.
    one = train.Settings(condition=2)
    assert (one.steps, one.eval_every) == (quick["steps"], quick["eval_every"])


def test_a_grid_goes_on_where_it_stopped(few, tmp_path, monkeypatch):
    runs = reproduce.grid((0, 9), 2, steps=1, batch_size=4)
    trained, really = [], train._train

    def interrupted(settings, *arguments):
        trained.append((settings.condition, settings.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt("stopped")
        really(settings, *arguments)

    monkeypatch.setattr(train, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run({tmp_path: runs}, few)
    accuracies = reproduce.run({tmp_path: runs}, few)[tmp_path]
    third = (0, 1)
    assert trained == [(0, 0), (9, 0), third, third, (9, 1)]
    assert list(accuracies) == [0, 9]
    for condition, values in accuracies.items():
        assert len(values) == 2
        for seed, value in enumerate(values):
            folder = tmp_path / str(condition) / str(seed)
            assert (
                f'"test_accuracy": {value}}}\n'
                in (folder / "metrics.jsonl").read_text()
            )


def test_results_that_lack_their_weights_are_not_trained_again(few, tmp_path):
    """As they are in a clone; beside them another seed can be trained."""
    settings = {"steps": 2, "eval_every": 1, "batch_size": 4}
    reproduce.run({tmp_path: reproduce.grid((9,), 1, **settings)}, few)
    first = tmp_path / "9/0"
    (first / "final.weights.h5").unlink()
    (first / "recalibrated.json").unlink()
    before = {x: x.read_bytes() for x in first.iterdir() if x.is_file()}
    runs = reproduce.grid((9,), 2, **settings)
    accuracies = reproduce.run({tmp_path: runs}, few)[tmp_path]
    after = {x: x.read_bytes() for x in first.iterdir() if x.is_file()}
    assert after == before
    assert len(accuracies[9]) == 2
    assert (tmp_path / "9/1/final.weights.h5").exists()


def test_a_damaged_checkpoint_is_found_before_others_are_trained(
    few, tmp_path, monkeypatch
):
    runs = reproduce.grid((0, 9), 1, steps=4, eval_every=2, batch_size=4)

    def killed(folder, network):
        raise KeyboardInterrupt("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            reproduce.run({tmp_path: runs[1:]}, few)
    checkpoint = tmp_path / "9/0/checkpoint.npz"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ExperimentError, match="checkpoint.npz is damaged"):
        reproduce.run({tmp_path: runs}, few)
    assert not (tmp_path / "0").exists()


def test_a_run_killed_before_its_weights_goes_on(few, tmp_path):
    (one,) = reproduce.grid((9,), 1, steps=2, eval_every=1, batch_size=4)
    kept, save = {}, run_folder.RunFolder.finish

    def killed(folder, network):
        kept.update({x: x.read_bytes() for x in folder.path.glob("*.*")})
        save(folder, network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "finish", killed)
        reproduce.run({tmp_path: [one]}, few)
    weights = tmp_path / "9/0/final.weights.h5"
    weights.unlink()
    for path, content in kept.items():
        path.write_bytes(content)
    reproduce.run({tmp_path: [one]}, few)
    assert weights.exists()


def test_other_settings_are_found_before_training(few, tmp_path, monkeypatch):
    changed = {"eval_every": 1, "batch_size": 4}
    reproduce.run({tmp_path: reproduce.grid((9,), 1, steps=1, **changed)}, few)
    monkeypatch.setattr(train, "_train", None)
    with pytest.raises(ExperimentError, match="steps=1 there, 2 now"):
        runs = reproduce.grid((0, 9), 1, steps=2, **changed)
        reproduce.run({tmp_path: runs}, few)


def test_results_that_share_no_report_are_found_before_training(
    few, tmp_path, monkeypatch
):
    sgd = {"steps": 1, "batch_size": 4, "optimizer": "sgd"}
    reproduce.run({tmp_path: reproduce.grid((0,), 1, **sgd)}, few)
    monkeypatch.setattr(train, "_train", None)
    adam = reproduce.grid((2, 9), 1, steps=1, batch_size=4)
    said = "differ in optimizer: adam in 2/0, sgd in 0/0"
    with pytest.raises(ExperimentError, match=said):
        reproduce.run({tmp_path: adam}, few)


def test_what_others_train_is_waited_for(few, tmp_path, monkeypatch):
    runs = reproduce.grid((0, 9), 2, steps=1, batch_size=4)
    asked, busy = [], {runs[0]: 3, runs[2]: 1}

    def run(settings, dataset, output, on_steps):
        asked.append(runs.index(settings))
        if busy.get(settings):
            busy[settings] -= 1
            raise run_folder.BusyError
        return [{"test_accuracy": settings.condition / 10 + settings.seed}]

    monkeypatch.setattr(train, "run", run)
    waited = []
    monkeypatch.setattr(many_runs.time, "sleep", waited.append)
    found = reproduce.run({tmp_path: runs}, few)[tmp_path]
    assert found == {0: [0.0, 1.0], 9: [0.9, 1.9]}
    assert asked == [0, 1, 2, 3, 0, 2, 0, 0]
    assert len(waited) == 1


# Notes each training that begins, before it does.
_NOTING = """
import os, sys
from experiments import launch, reproduce, training
run, notes = training.Training.run, sys.argv.pop()
def noted(self):
    with open(notes, "a") as file:
        print(os.getpid(), self._name, file=file)
    run(self)
training.Training.run = noted
reproduce.define_flags()
launch(reproduce.main)
"""


def test_two_processes_share_a_grid_and_one_is_killed(tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("")
    flags = [
        "--dataset=digits",
        "--conditions=0,3",
        "--seeds=2",
        "--steps=12",
        "--eval_every=12",
        "--batch_size=8",
        f"--output={tmp_path / 'results'}",
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _NOTING, *flags, str(notes)],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]

    def begun():
        lines = [x.split(maxsplit=1) for x in notes.read_text().splitlines()]
        return [(int(pid), name) for pid, name in lines]

    killed, other = processes
    try:
        wait_until(lambda: killed.pid in dict(begun()), killed)
        killed.kill()
        killed.wait()
        said, errors = other.communicate(timeout=LIMIT)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert other.returncode == 0, errors
    assert [line.split()[0] for line in said.splitlines()[2:4]] == ["0", "3"]
    names = {
        f"condition {condition}, seed {seed}"
        for condition in (0, 3)
        for seed in (0, 1)
    }
    by_killed, by_other = (
        [name for pid, name in begun() if pid == process.pid]
        for process in processes
    )
    # What the killed one was training, and nothing else, is begun again.
    assert sorted(by_killed[:-1] + by_other) == sorted(names)
    assert by_killed[-1] in by_other
    assert not [x for x in os.listdir(tmp_path / "results/0/0") if x == "lock"]


@pytest.mark.parametrize(
    ("number", "steps", "published"),
    [
        (11, 2_000, "0.622"),
        (11, article.STEPS, "0.754"),
        (2, 600, "0.510 at 2,000 steps"),
        # Between the steps of the article's table, as in the report.
        (2, 3_500, "0.535"),
    ],
)
def test_published_beside_the_same_step(number, steps, published):
    text = reproduce.table({number: [0.5]}, {}, steps, _CIFAR10)
    assert text.splitlines()[1].split(maxsplit=5)[5] == published


def test_help_says_every_default():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.reproduce", "--help"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    said = " ".join(done.stdout.split())
    for default in (
        "Training steps (default: 600",
        "between evaluations (default: 100",
        "quick: conditions 2 and 11, 600 steps, evaluated every 100",
        "as 2,11 (default: the preset's)",
    ):
        assert default in said


def test_table_on_cifar10():
    text = reproduce.table(
        {11: [0.6, 0.7], 2: [0.512]}, {11: [0.75]}, 2_000, _CIFAR10
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1:] == [
        "2 none 0.4 0.512 none 0.510",
        "11 both 0.4 0.650 +- 0.071 (2 seeds) 0.750 0.622",
    ]


def test_table_on_other_data_has_nothing_published(few):
    text = reproduce.table({11: [0.6]}, {}, 2_000, few)
    assert text.splitlines()[1].split() == [
        "11",
        "both",
        "0.4",
        "0.600",
        "none",
        "none",
    ]


def test_recalibrated_accuracies_are_those_of_the_runs_asked_for(tmp_path):
    for condition, seed, text in (
        (2, 0, None),
        (11, 0, '{"images": 9, "test_accuracy": 0.25}'),
        (11, 1, '{"images": 9, "test_accuracy": 0.75}'),
        (11, 2, '{"images": 9, "test_accuracy": 0.5}'),
    ):
        folder = tmp_path / str(condition) / str(seed)
        folder.mkdir(parents=True)
        if text:
            (folder / "recalibrated.json").write_text(text)
    runs = reproduce.grid((2, 11), 2)
    assert reproduce.recalibrated(tmp_path, runs) == {11: [0.25, 0.75]}


@pytest.mark.parametrize(
    ("runs", "default"),
    [
        (reproduce.grid((2, 11), 1), True),
        (reproduce.grid((2, 11), 3), True),
        (reproduce.grid((11,), 1), False),
        (reproduce.grid((2, 11), 1, steps=700), False),
        (reproduce.grid((2, 11), 1, layer="keras"), False),
    ],
)
def test_which_runs_are_those_of_no_flags(runs, default):
    assert reproduce.is_default(runs) == default


def test_the_default_run_tells_one_story_whatever_rounds_and_draws():
    """Batch normalization leads by 0.1 with each seed, oneDNN on and off."""
    seen, leads = [], []
    for results in sorted(reproduce.DEFAULT_RUNS.iterdir()):
        final = {}
        for run in result_files.read_runs(results):
            assert run.last_step == reproduce.PRESETS["quick"]["steps"]
            final[run.condition.number, run.seed] = run.accuracies[-1]
            seen.append((run.facts["onednn"], run.condition.number, run.seed))
            if run.condition.number == 11:
                assert run.recalibrated > run.accuracies[-1]
        for seed in (0, 1):
            leads.append(final[11, seed] - final[2, seed])
    assert min(leads) >= 0.1
    text = " ".join((_ROOT / "README.md").read_text().split())
    assert (
        f"condition 11 was ahead by {min(leads):.2f} to {max(leads):.2f}"
    ) in text
    assert sorted(seen) == [
        (onednn, condition, seed)
        for onednn in (False, True)
        for condition in (2, 11)
        for seed in (0, 1)
    ]


def test_the_spread_to_expect_is_that_of_the_runs_kept(tmp_path):
    for name, off in (("off", 0.0), ("on", 0.25)):
        write_run(tmp_path / name, 2, 0, [0.5, 0.125 + off])
        write_run(tmp_path / name, 11, 1, [0.0, 0.5 + off])
        (tmp_path / name / "11/1/recalibrated.json").write_text(
            json.dumps({"images": 9, "test_accuracy": 0.625 + off})
        )
    said = reproduce.spread_to_expect(tmp_path)
    assert "Over 2 seeds, with oneDNN on and off, " in said
    assert said.endswith(
        "condition 2 at 0.12 to 0.38 and condition 11 at 0.50 to 0.75, "
        "recalibrated at 0.62 to 0.88."
    )
    assert "\n" not in said


def test_the_program_from_flags_to_report(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.reproduce",
            "--dataset=digits",
            "--conditions=0,3",
            "--steps=2",
            "--eval_every=1",
            "--batch_size=8",
            f"--output={tmp_path}",
        ],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == f"report: {tmp_path / 'report.html'}"
    assert "not the article's comparison" in said[-2]
    assert [line.split()[0] for line in said[1:4]] == ["condition", "0", "3"]
    assert (tmp_path / "report.html").stat().st_size


# Says what becomes of each of some command lines.
_ASKING = """
import sys
from absl import flags
from absl.testing import flagsaver
from experiments import ExperimentError, reproduce
reproduce.define_flags()
for line in sys.argv[1:]:
    with flagsaver.flagsaver():
        flags.FLAGS(["reproduce", *line.split()])
        try:
            print([len(x) for x in reproduce.grids_from_flags().values()])
        except ExperimentError as error:
            print(error)
"""


def test_what_arms_differ_in_cannot_be_given():
    wrong = {
        "--preset=layer --layer=keras": "layer=keras",
        "--preset=input_and_order --shuffle": "shuffle=True",
        "--preset=placement --placement=before": "placement=before",
        "--preset=learning_rate --learning_rate=0.5": "learning_rate=0.5",
        "--preset=layer --learning_rate=0.5": "learning_rate=0.5",
    }
    others = {
        "--preset=layer --conditions=3,9": "layer are 9,11. Received: "
        "conditions=3,9",
        "--preset=placement --conditions=0": "give a condition that has it. "
        "Received: conditions=0",
    }
    # Without batch normalization, condition 0, there is nothing to place.
    right = {
        "--preset=layer --optimizer=sgd": "[2, 2]",
        "--layer=keras": "[2]",
        "--preset=placement": "[2, 1, 1]",
        "--preset=learning_rate": "[2, 2, 2]",
    }
    done = subprocess.run(
        [sys.executable, "-c", _ASKING, *wrong, *others, *right],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()
    for line, received in zip(said, wrong.values()):
        assert line.endswith(f"leave that flag out. Received: {received}")
    for line, end in zip(said[len(wrong) :], others.values()):
        assert line.endswith(end)
    assert said[len(wrong) + len(others) :] == list(right.values())


def test_an_empty_output_is_refused():
    asked = subprocess.run(
        [sys.executable, "-c", _ASKING, "--output="],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert asked.stdout == (
        "output is the folder of all results. Received: an empty one\n"
    )


def test_a_control_experiment_from_flags_to_verdict(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.reproduce",
            "--preset=layer",
            "--dataset=digits",
            "--conditions=9",
            "--seeds=2",
            "--steps=1",
            "--batch_size=8",
            f"--output={tmp_path}",
        ],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    runs = {
        str(path.parent.relative_to(tmp_path)): json.loads(path.read_text())
        for path in tmp_path.rglob("run.json")
    }
    assert {x: facts["layer"] for x, facts in runs.items()} == {
        f"controls/{arm}/9/{seed}": layer
        for arm, layer in (("article", "keras_bn"), ("layer/keras", "keras"))
        for seed in (0, 1)
    }
    said = "Our layer instead of Keras's (condition 9): "
    assert said in done.stdout
    assert "over 2 seeds" in done.stdout
    assert "Is it our layer?" in (tmp_path / "report.html").read_text()

"""One condition: training, resuming, and what a run leaves behind."""

import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import experiments
import keras_bn
from experiments import ExperimentError
from experiments import article
from experiments import data
from experiments import evaluation
from experiments import models
from experiments import run_model
from experiments import train
from tests.waiting import LIMIT
from tests.waiting import wait_until

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def few():
    """A few digits: a data set on which a step costs little."""
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:20],
        train_labels=digits.train_labels[:20],
        test_images=digits.test_images[:30],
        test_labels=digits.test_labels[:30],
    )


def _settings(**changes):
    return train.Settings(
        **{
            "condition": 11,
            "steps": 5,
            "eval_every": 2,
            "batch_size": 4,
            **changes,
        }
    )


def _after(steps):
    """An `on_steps` that interrupts a run when so many steps are done."""
    done = 0

    def count(new):
        nonlocal done
        done += new
        if done == steps:
            raise KeyboardInterrupt

    return count


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    train.run(_settings(), few, output)
    return output / "11" / "0"


def test_a_runs_folder(undisturbed):
    assert sorted(os.listdir(undisturbed)) == [
        "final.weights.h5",
        "metrics.jsonl",
        "recalibrated.json",
        "run.json",
        "tensorboard",
        "timing.jsonl",
    ]


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_and_timing(undisturbed):
    metrics = _read(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [2, 4, 5]
    for line in metrics:
        assert list(line) == [
            "step",
            "train_loss",
            "train_accuracy",
            "test_loss",
            "test_accuracy",
        ]
        # 30 test images; batches of 4, one or two of them in a line.
        assert line["test_accuracy"] * 30 == pytest.approx(
            round(line["test_accuracy"] * 30), abs=1e-4
        )
        assert line["train_accuracy"] * 8 == pytest.approx(
            round(line["train_accuracy"] * 8), abs=1e-4
        )
    timing = _read(undisturbed / "timing.jsonl")
    assert [line["step"] for line in timing] == [2, 4, 5]
    for line, images in zip(timing, (8, 8, 4)):
        assert line["eval_seconds"] > 0
        speed = images / line["train_seconds"]
        assert line["images_per_second"] == pytest.approx(speed)


def test_run_json_says_what_made_the_run(undisturbed):
    facts = json.loads((undisturbed / "run.json").read_text())
    backend = keras.backend.backend()
    expected = {
        "condition": 11,
        "batch_norm": "both",
        "dropout": 0.4,
        "seed": 0,
        "steps": 5,
        "eval_every": 2,
        "batch_size": 4,
        "optimizer": "adam",
        "optimizer_epsilon": 1e-8,
        "learning_rate": 1e-3,
        "input": "raw",
        "shuffle": False,
        "layer": "keras_bn",
        "placement": "after",
        "distribution": "none",
        "replicas": 1,
        "synchronized": False,
        "dataset": "digits",
        "backend": backend,
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["packages"]["keras"] == keras.__version__
    assert facts["packages"].keys() == {"python", "keras", "numpy", backend}
    assert facts.keys() - expected.keys() == {
        "dataset_version",
        "dataset_copy",
        "device",
        "processor",
        "cores",
        "onednn",
        "packages",
        "revision",
    }
    assert "pu" in facts["device"].lower()  # CPU:0, cuda:0, TFRT_CPU_0
    assert facts["processor"]
    # Of the fixture's process, in whatever cores this one may use.
    assert 1 <= facts["cores"] <= os.cpu_count()
    # TF_ENABLE_ONEDNN_OPTS: what the user says, else on.
    chosen = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1") == "1"
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86:
        assert facts["onednn"] is (chosen if backend == "tensorflow" else None)


def test_tensorboard_logs_have_the_metrics(undisturbed):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    logs = accumulator.EventAccumulator(str(undisturbed / "tensorboard"))
    logs.Reload()
    for name in ("train_loss", "test_accuracy"):
        # Written as tensors of one number.
        found = [
            (event.step, event.tensor_proto.float_val[0])
            for event in logs.Tensors(name)
        ]
        lines = _read(undisturbed / "metrics.jsonl")
        expected = [(line["step"], line[name]) for line in lines]
        assert found == [
            (step, pytest.approx(value)) for step, value in expected
        ]


def test_final_weights_are_the_networks(undisturbed, few):
    network = models.build(article.CONDITIONS[11], seed=1)
    network.load_weights(undisturbed / "final.weights.h5")
    model = run_model.build(_settings(seed=1))
    model.set_weights(network.get_weights())
    test = evaluation.evaluate(
        model, few.test_images.astype("float32"), few.test_labels
    )
    last = _read(undisturbed / "metrics.jsonl")[-1]
    assert test["loss"] == pytest.approx(last["test_loss"], rel=1e-5)
    assert test["accuracy"] == pytest.approx(last["test_accuracy"])
    # 4.3 million float32 and no optimizer's variables beside them.
    size = (undisturbed / "final.weights.h5").stat().st_size
    assert 4 * 4_263_754 < size < 1.1 * 4 * 4_263_754


def test_what_recalibration_makes_of_it(undisturbed, few):
    model = models.build(article.CONDITIONS[11])
    model.load_weights(undisturbed / "final.weights.h5")
    keras_bn.recalibrate(model, few.train_images.astype("float32"))
    logits = model.predict(few.test_images.astype("float32"), verbose=0)
    (found,) = _read(undisturbed / "recalibrated.json")
    right = np.mean(logits.argmax(-1) == few.test_labels)
    assert found == {"images": 20, "test_accuracy": pytest.approx(right)}


def test_nothing_is_recalibrated_where_nothing_is_normalized(few, tmp_path):
    train.run(_settings(condition=0, steps=1), few, tmp_path)
    assert "recalibrated.json" not in os.listdir(tmp_path / "0/0")


def test_a_run_that_diverged_does_not_end_the_grid(few, tmp_path, capsys):
    settings = _settings(condition=9, learning_rate=1e8)
    lines = train.run(settings, few, tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    said = capsys.readouterr().err
    assert "9/0: not recalibrated: " in said
    assert "not finite" in said
    assert "recalibrated.json" not in os.listdir(tmp_path / "9/0")
    assert "final.weights.h5" in os.listdir(tmp_path / "9/0")


def test_a_killed_recalibration_leaves_nothing(undisturbed, few, tmp_path):
    """The file that it was writing goes, and is written again."""
    folder = tmp_path / "11/0"
    shutil.copytree(undisturbed, folder)
    answer = (folder / "recalibrated.json").rename(
        folder / ".recalibrated.json.abc"
    )
    expected = answer.read_text()
    answer.write_text("{")
    train.run(_settings(), few, tmp_path)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(undisturbed))
    assert (folder / "recalibrated.json").read_text() == expected


def test_two_processes_do_not_both_recalibrate(undisturbed, few, tmp_path):
    folder = tmp_path / "11/0"
    shutil.copytree(undisturbed, folder)
    (folder / "recalibrated.json").unlink()
    with train.open_folder(_settings(), few, tmp_path).locked():
        train.run(_settings(), few, tmp_path)
        assert not (folder / "recalibrated.json").exists()
    train.run(_settings(), few, tmp_path)
    assert (folder / "recalibrated.json").exists()


def test_a_resumed_run_is_the_undisturbed_run(undisturbed, few, tmp_path):
    with pytest.raises(KeyboardInterrupt) as interruption:
        train.run(_settings(), few, tmp_path, _after(4))
    # Step 4 was done, but not its evaluation.
    assert "stopped after step 4;" in str(interruption.value)
    assert "goes on from step 2" in str(interruption.value)
    folder = tmp_path / "11" / "0"
    assert not (folder / "final.weights.h5").exists()
    # What a killed program could have left after its checkpoint.
    for name in ("metrics.jsonl", "timing.jsonl"):
        line = _read(folder / name)[-1] | {"step": 4}
        with open(folder / name, "a") as file:
            file.write(json.dumps(line) + '\n{"step": 5, "tr')
    train.run(_settings(), few, tmp_path)
    for name in ("metrics.jsonl", "run.json"):
        expected = (undisturbed / name).read_bytes()
        assert (folder / name).read_bytes() == expected
    steps = [line["step"] for line in _read(folder / "timing.jsonl")]
    assert steps == [2, 4, 5]
    assert sorted(os.listdir(folder)) == sorted(os.listdir(undisturbed))


def test_a_full_disk_is_one_line(few, tmp_path, monkeypatch):
    def full(*arguments, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ExperimentError, match="No space left on device"):
        train.run(_settings(condition=0, steps=1), few, tmp_path)


def test_a_finished_run_is_not_trained_again(undisturbed, few, monkeypatch):
    monkeypatch.setattr(train, "_train", None)
    done = []
    metrics = train.run(_settings(), few, undisturbed.parents[1], done.append)
    assert metrics == _read(undisturbed / "metrics.jsonl")
    assert done == [5]


def test_a_finished_run_is_shown_from_a_read_only_folder(
    undisturbed, monkeypatch
):
    def refuse(path):
        raise ExperimentError(f"cannot write {path}")

    monkeypatch.setattr(train.atomic, "check_folder", refuse)
    train.check_output(_settings(), undisturbed.parents[1])
    with pytest.raises(ExperimentError, match="cannot write"):
        train.check_output(_settings(seed=1), undisturbed.parents[1])


def test_an_interruption_that_a_library_swallowed(few, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_interruptions", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0"):
        train.run(_settings(), few, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 6}, "steps=5 there, 6 now"),
        ({"input": "standardized"}, "input=raw there, standardized now"),
        ({"layer": "keras"}, "layer=keras_bn there, keras now"),
        ({"optimizer": "sgd"}, "optimizer=adam there, sgd now"),
    ],
)
def test_a_folder_of_other_settings(undisturbed, few, changes, said):
    before = (undisturbed / "run.json").read_bytes()
    with pytest.raises(ExperimentError) as error:
        train.run(_settings(**changes), few, undisturbed.parents[1])
    assert said in str(error.value)
    assert "another output, or delete the folder" in str(error.value)
    assert (undisturbed / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"condition": 12}, "condition=12"),
        ({"steps": -1}, "steps=-1"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"input": "grey"}, "input='grey'"),
        ({"layer": "flax"}, "layer='flax'"),
    ],
)
def test_settings_out_of_range(changes, received):
    with pytest.raises(ExperimentError, match=f"Received: {received}$"):
        _settings(**changes)


@pytest.mark.parametrize(
    ("name", "kind", "epsilon"),
    [
        ("adam", "Adam", 1e-8),
        ("sgd", "SGD", None),
        ("rmsprop", "RMSprop", 1e-7),
    ],
)
def test_optimizers(name, kind, epsilon):
    optimizer = run_model.make_optimizer(
        _settings(optimizer=name, learning_rate=0.25)
    )
    assert type(optimizer).__name__ == kind
    assert float(optimizer.learning_rate) == 0.25
    assert getattr(optimizer, "epsilon", None) == epsilon


def test_evaluation_is_over_all_images(monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)
    model = run_model.build(_settings(condition=9))
    random = np.random.default_rng(0)
    images = random.uniform(0, 255, (10, 32, 32, 3)).astype(np.float32)
    labels = np.arange(10, dtype=np.int32)
    logits = keras.ops.convert_to_numpy(model(images, training=False))
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    result = evaluation.evaluate(model, images, labels)
    assert result["loss"] == pytest.approx(
        -log_probabilities[labels, labels].mean(), rel=1e-4
    )
    assert result["accuracy"] == pytest.approx(
        np.mean(logits.argmax(axis=1) == labels)
    )


def test_mean_is_over_images_not_batches():
    mean = evaluation.Mean()
    mean.add({"loss": 1.0}, 3)
    mean.add({"loss": 5.0}, 1)
    assert mean.count == 4
    assert mean.values() == {"loss": 2.0}


def _start(program, *flags, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{program}", *flags],
        cwd=_ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Programs given what they cannot use: name -> (process, folder)."""
    folder = tmp_path_factory.mktemp("failures")
    (folder / "file").write_text("")
    digits = ["--dataset=digits", "--condition=0"]
    flags = {
        "no such condition": ["--condition=12"],
        "unwritable": [*digits, f"--output={folder}/file/below"],
        "missing data": ["--condition=0", f"--data_dir={folder}/missing"],
        "preset and flag": ["--preset=gpu_check", "--batch_size=512"],
    }
    # All at once: most of their time is spent in importing.
    output = f"--output={folder}/output"
    return {
        name: _start("train", output, *given) for name, given in flags.items()
    } | {
        name: _start(
            "train", output, *digits, "--layer=keras", KERAS_BACKEND=name
        )
        for name in ("numpy", "foo")
    }, folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no such condition", "Received: condition=12"),
        ("unwritable", "cannot write"),
        ("missing data", "data folder does not exist"),
        ("preset and flag", "leave out --batch_size"),
        ("numpy", "KERAS_BACKEND to one of tensorflow, jax, torch"),
        ("foo", "KERAS_BACKEND to one of tensorflow, jax, torch"),
    ],
)
def test_errors_of_the_program(failures, name, said):
    processes, folder = failures
    _, errors = processes[name].communicate(timeout=LIMIT)
    assert processes[name].returncode == 1
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert line.startswith("error: ") and said in line
    assert not [
        p for p in folder.rglob("*") if p.name != "file" and p.is_file()
    ]


def test_an_interrupted_program_says_how_to_go_on(tmp_path):
    process = _start(
        "train",
        "--dataset=digits",
        "--condition=0",
        "--batch_size=8",
        "--steps=100000",
        "--eval_every=1",
        f"--output={tmp_path}",
    )
    metrics = tmp_path / "0/0/metrics.jsonl"
    try:
        wait_until(
            lambda: metrics.exists() and metrics.stat().st_size, process
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(
        "interrupted: condition 0, seed 0"
    )
    assert "the same command goes on from step" in errors
    assert not list(tmp_path.rglob("incomplete.*"))

"""Training on several devices and in several processes.

Every run is a program of its own, for a framework takes its devices once in a
process. What they train must be what one device trains.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from experiments import ExperimentError
from experiments import article
from experiments import models
from experiments import run_settings
from experiments import two_workers
from experiments.distribution import workers

_ROOT = Path(__file__).parents[2]
_BACKEND = keras.backend.backend()
# What spreads a run over devices, and what over processes.
_DEVICES = {"tensorflow": "mirrored", "jax": "data_parallel"}.get(_BACKEND)
_PROCESSES = {
    "tensorflow": "multiworker",
    "jax": "data_parallel",
    "torch": "ddp",
}[_BACKEND]
# JAX cuts a batch into equal shares only.
_BATCH = 8 if _BACKEND == "jax" else 7
# What makes the moments those of the whole batch: arrays are, under JAX's.
_SYNCHRONIZED = {"tensorflow": ["--synchronized"], "jax": []}.get(_BACKEND)
# A program on a few digits, on which a step and an evaluation cost little.
_PROGRAM = """
import dataclasses
import functools
import os

import experiments
from experiments import data
from experiments import train

whole = data.load_digits

def few():
    digits = whole()
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:40],
        train_labels=digits.train_labels[:40],
        test_images=digits.test_images[:31],
        test_labels=digits.test_labels[:31],
    )

to_do = int(os.environ.get("STEPS_BEFORE_INTERRUPTION", -1))

def count(steps):
    global to_do
    to_do -= steps
    if not to_do:
        raise KeyboardInterrupt

data.load_digits = few
train.run = functools.partial(train.run, on_steps=count)
train.define_flags()
experiments.launch(train.main)
"""


def _start(output, *given, environment=None):
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            _PROGRAM,
            "--dataset=digits",
            f"--batch_size={_BATCH}",
            "--input=standardized",
            f"--output={output}",
            *given,
        ],
        cwd=_ROOT,
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _start_both(output, *given, **added):
    return [
        _start(
            output,
            f"--distribution={_PROCESSES}",
            *given,
            environment=environment | added,
        )
        for environment in two_workers.environments(_BACKEND)
    ]


def _said(process, timeout=90):
    """Waits for a program to fail; returns the line it says at the end."""
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    (line,) = [x for x in errors.splitlines() if x.startswith("error: ")]
    return line


def _finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def _metrics(output, condition=0):
    lines = (output / f"{condition}/0/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _weights(output):
    network = models.build(article.CONDITIONS[0])
    network.load_weights(output / "0/0/final.weights.h5")
    return network.get_weights()


def _require_same_metrics(output, reference, condition, error):
    found, expected = (_metrics(x, condition) for x in (output, reference))
    assert len(found) == len(expected) == 2
    for line, right in zip(found, expected):
        assert line == pytest.approx(right, rel=error)


def _require_same(output, reference):
    _require_same_metrics(output, reference, 0, 2e-4)
    for value, right in zip(_weights(output), _weights(reference)):
        scale = np.abs(right).max()
        np.testing.assert_allclose(value, right, atol=1e-5 * scale, rtol=0)


_FLAGS = (
    "--condition=0",
    "--steps=6",
    "--eval_every=3",
    "--optimizer=sgd",
    "--learning_rate=0.01",
)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    output = tmp_path_factory.mktemp("one_device")
    _finish(_start(output, *_FLAGS))
    return output


def test_two_processes_train_what_one_does(one_device, tmp_path):
    _finish(*_start_both(tmp_path, *_FLAGS))
    _require_same(tmp_path, one_device)
    facts = json.loads((tmp_path / "0/0/run.json").read_text())
    assert facts["distribution"] == _PROCESSES
    assert facts["replicas"] == 2
    assert facts["synchronized"] is False


if _DEVICES:

    def test_two_devices_train_what_one_does(one_device, tmp_path):
        _finish(
            _start(
                tmp_path,
                f"--distribution={_DEVICES}",
                "--cpu_devices=2",
                *_FLAGS,
            )
        )
        _require_same(tmp_path, one_device)


def test_an_interrupted_run_goes_on(tmp_path):
    """With batch normalization, and dropout of each replica's own."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--condition=11", "--steps=4", "--eval_every=2"]
    undisturbed = _start_both(whole, *flags)
    interrupted = _start_both(parts, *flags, STEPS_BEFORE_INTERRUPTION="3")
    for process in interrupted:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].endswith(
            "stopped after step 3; the same command goes on from step 2"
        )
    assert not list(parts.rglob("incomplete.*"))
    _finish(*undisturbed)
    _finish(*_start_both(parts, *flags))
    for name in ("metrics.jsonl", "run.json"):
        expected, found = (
            (x / "11/0" / name).read_bytes() for x in (whole, parts)
        )
        assert found == expected


if _SYNCHRONIZED is not None:

    def test_synchronized_batch_normalization(tmp_path):
        # Batch normalization after a layer of which few units are alive makes
        # a rounding error 50 times larger in a step, so there are but two.
        flags = ["--condition=9", "--optimizer=sgd", "--learning_rate=0.001"]
        flags += ["--steps=2", "--eval_every=1", f"--batch_size={2 * _BATCH}"]
        one, two = tmp_path / "one", tmp_path / "two"
        programs = [_start(one, *flags)]
        programs += _start_both(two, *flags, *_SYNCHRONIZED)
        _finish(*programs)
        # Unsynchronized losses differ by 5%.
        _require_same_metrics(two, one, 9, 1e-3)


def test_a_worker_that_ends_and_one_that_never_comes(tmp_path):
    """All at once, for most of their time is spent in importing."""
    flags = ["--condition=0", "--steps=1000000", "--time_limit=15"]
    alone = _start_both(tmp_path / "alone", "--condition=0", "--time_limit=5")
    alone[1].kill()
    alone[1].communicate()
    lost = _start_both(tmp_path / "lost", *flags, "--eval_every=2")
    metrics = tmp_path / "lost/0/0/metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size):
        assert lost[0].poll() is None and time.monotonic() - began < 120
        time.sleep(0.1)
    lost[1].kill()
    lost[1].communicate()
    line = _said(lost[0], timeout=45)
    assert "another worker ended" in line or "did not answer" in line
    assert not list(tmp_path.rglob("incomplete.*"))
    line = _said(alone[0])
    assert "did not answer within 5 seconds (time_limit)" in line
    assert not (tmp_path / "alone").exists()


_UNUSABLE = {
    "another backend's": (
        ["--distribution=" + ("ddp" if _BACKEND != "torch" else "mirrored")],
        {},
        "set KERAS_BACKEND=",
    ),
    "no limit": (["--time_limit=0"], {}, "time_limit=0"),
    "devices": (["--cpu_devices=2"], {}, "cpu_devices=2, distribution=none"),
    "synchronized Keras": (
        ["--layer=keras", "--condition=1", "--synchronized"],
        {},
        "Keras's own layer is synchronized on TensorFlow alone",
    ),
}
_LAUNCHED = f"--distribution={_PROCESSES}"
_UNUSABLE |= {
    "tensorflow": {
        "not launched": ([_LAUNCHED], {}, "TF_CONFIG=''"),
        "launched wrongly": (
            [_LAUNCHED],
            {"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}, "task": 3}'},
            "multiworker needs TF_CONFIG",
        ),
        "too few images": (
            ["--distribution=mirrored", "--cpu_devices=2", "--batch_size=1"],
            {},
            "each of the 2 replicas needs an image",
        ),
    },
    "jax": {
        "launched wrongly": (
            [_LAUNCHED],
            {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"},
            "KERAS_DISTRIBUTION_PROCESS_ID=None",
        ),
        "too few images": (
            [_LAUNCHED, "--cpu_devices=2", "--batch_size=1"],
            {},
            "each of the 2 replicas needs an image",
        ),
        "unequal shares": (
            [_LAUNCHED, "--cpu_devices=2", "--batch_size=7"],
            {},
            "give a multiple of 2. Received: batch_size=7",
        ),
    },
    "torch": {
        "not launched": ([_LAUNCHED], {}, "Missing: RANK"),
        "launched wrongly": (
            [_LAUNCHED],
            {
                "RANK": "2",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
            },
            "RANK=2, WORLD_SIZE=2",
        ),
    },
}[_BACKEND]
if _BACKEND == "tensorflow":
    del _UNUSABLE["synchronized Keras"]


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    output = tmp_path_factory.mktemp("unusable")
    return output, {
        name: _start(output, "--condition=0", *given, environment=environment)
        for name, (given, environment, _) in _UNUSABLE.items()
    }


@pytest.mark.parametrize("name", list(_UNUSABLE))
def test_what_cannot_be_used_is_one_line(unusable, name):
    output, programs = unusable
    assert _UNUSABLE[name][2] in _said(programs[name])
    assert not list(output.iterdir())


@pytest.mark.parametrize("distribution", ["ray", ""])
def test_a_distribution_out_of_range(distribution):
    with pytest.raises(ExperimentError, match="distribution is one of none"):
        run_settings.Settings(condition=0, distribution=distribution)


def test_replicas_draw_their_own_dropout():
    chief = np.array([2**31 - 1, 7], np.int32)
    states = [workers.dropout_state(chief, replica) for replica in range(4)]
    assert states[0].tolist() == chief.tolist()
    assert len({int(seed) for seed, _ in states}) == 4
    for seed, drawn in states:
        # On PyTorch Keras seeds a generator with the sum of the two.
        assert 0 <= seed < 2**31 and drawn == 7
        others = [int(x[0]) for x in states if x[0] != seed]
        assert min(abs(other - int(seed)) for other in others) > 1000


def test_shares_of_a_batch():
    replicas = workers.Replicas()
    replicas.replicas = 3
    shares = [replicas.share(np.arange(8), x).tolist() for x in range(3)]
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_two_workers_program(tmp_path):
    program = [sys.executable, "-m", "experiments.two_workers"]
    flags = ["--dataset=digits", f"--output={tmp_path}", "--condition=0"]
    done = subprocess.run(
        [*program, *flags, "--time_limit=30", "--batch_size=1"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: worker ")
    assert not list(tmp_path.iterdir())

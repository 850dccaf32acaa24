"""Training on several devices and in several processes.

A framework takes its devices once in a process, so these are programs of their
own. Each makes several runs, for most of its time is spent in importing. What
they train must be what one device trains.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from experiments import ExperimentError
from experiments import article
from experiments import data
from experiments import distribution
from experiments import models
from experiments import run_settings
from experiments import train
from experiments import two_workers
from experiments.distribution import workers
from tests.waiting import LIMIT
from tests.waiting import wait_until

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
_SHAPE = (8, 8, 3)
# A program on a few small digits, on which a step and an evaluation, and a
# network's weights, cost little.
_PROGRAM = """
import atexit
import dataclasses
import functools
import json
import os
import time
from pathlib import Path

import experiments
from experiments import data
from experiments import models
from experiments import train

load, run = data.load_digits, train.run

def few():
    digits = load()
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:40, ::4, ::4],
        train_labels=digits.train_labels[:40],
        test_images=digits.test_images[:31, ::4, ::4],
        test_labels=digits.test_labels[:31],
    )

to_do = int(os.environ.get("STEPS_BEFORE_INTERRUPTION", -1))

def count(steps):
    global to_do
    to_do -= steps
    if not to_do:
        # Not before the other has this step too: it would fail in it.
        here = Path(os.environ["WHERE_TO_MEET"])
        (here / str(os.getpid())).touch()
        while len(list(here.iterdir())) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

def run_all(settings, dataset, output, workers):
    for changes, folder in json.loads(os.environ.get("RUNS_BEFORE", "[]")):
        before = dataclasses.replace(settings, **changes)
        run(before, dataset, folder, workers=workers)
    return run(settings, dataset, output, count, workers)

if "WORLD_SIZE" in os.environ:
    # Like PyTorch's destructors, which may wait for ever at Python's end.
    atexit.register(time.sleep, 1000)
data.load_digits, train.run = few, run_all
models.build = functools.partial(models.build, input_shape=(8, 8, 3))
train.define_flags()
experiments.launch(train.main)
"""


def _start(output, *given, environment=None):
    # In place of two devices; what is compiled runs but a few times.
    xla = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
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
        # Side by side on few cores, threads would wait for one another.
        env=os.environ | xla | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _start_both(output, *given, **added):
    # Of the two the chief alone can write, and needs to.
    return [
        _start(
            folder,
            f"--distribution={_PROCESSES}",
            # On a busy machine one may start much later than the other.
            f"--time_limit={LIMIT}",
            *given,
            environment=environment | added,
        )
        for folder, environment in zip(
            (output, os.devnull), two_workers.environments(_BACKEND)
        )
    ]


def _port(environment):
    """Returns where the first of two workers listens."""
    return {
        "tensorflow": lambda given: int(
            json.loads(given["TF_CONFIG"])["cluster"]["worker"][0].split(":")[1]
        ),
        "jax": lambda given: int(
            given["KERAS_DISTRIBUTION_JOB_ADDRESSES"].split(":")[1]
        ),
        "torch": lambda given: int(given["MASTER_PORT"]),
    }[_BACKEND](environment)


def _said(process):
    """Waits for a program to fail; returns the line it says at the end."""
    try:
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    (line,) = [x for x in errors.splitlines() if x.startswith("error: ")]
    return line


def _finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors


def _metrics(output, condition=0):
    lines = (output / f"{condition}/0/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _weights(output):
    network = models.build(article.CONDITIONS[0], _SHAPE)
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


_PLAIN = {
    "condition": 0,
    "steps": 6,
    "eval_every": 3,
    "optimizer": "sgd",
    "learning_rate": 0.01,
}
_FLAGS = [f"--{name}={value}" for name, value in _PLAIN.items()]
# Batch normalization after a layer of which few units are alive makes a
# rounding error 50 times larger in a step, so there are but two.
_WITH_MOMENTS = _PLAIN | {
    "condition": 9,
    "learning_rate": 0.001,
    "steps": 2,
    "eval_every": 1,
    "batch_size": 2 * _BATCH,
}
# With batch normalization, and dropout of each replica's own.
_INTERRUPTED = (
    "--condition=11",
    "--steps=4",
    "--eval_every=2",
    "--optimizer=adam",
)


def _before(*runs):
    return {
        "RUNS_BEFORE": json.dumps([(x, str(folder)) for x, folder in runs])
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """From names to folders of results, of programs that ran side by side."""
    names = ("one", "two", "one_9", "two_9", "whole", "parts")
    made = {name: tmp_path_factory.mktemp(name) for name in names}
    one = _start(
        made["one"],
        *_FLAGS,
        environment=_before((_WITH_MOMENTS, made["one_9"])),
    )
    # Arrays are whole under JAX's: so are their moments.
    synchronized = _BACKEND != "jax"
    two = _start_both(
        made["parts"],
        *_INTERRUPTED,
        **_before(
            (_PLAIN, made["two"]),
            (_WITH_MOMENTS | {"synchronized": synchronized}, made["two_9"]),
            ({}, made["whole"]),
        ),
        STEPS_BEFORE_INTERRUPTION="3",
        WHERE_TO_MEET=str(tmp_path_factory.mktemp("meeting")),
    )
    for process, saved in zip(two, ("step 2", "the chief's last checkpoint")):
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].endswith(
            f"stopped after step 3; the same command goes on from {saved}"
        )
    _finish(one)
    return made


def test_two_processes_train_what_one_does(folders):
    _require_same(folders["two"], folders["one"])
    facts = json.loads((folders["two"] / "0/0/run.json").read_text())
    assert facts["distribution"] == _PROCESSES
    assert facts["replicas"] == 2
    assert facts["synchronized"] is False


if _DEVICES:

    def test_two_devices_train_what_one_does(folders, tmp_path):
        _finish(
            _start(
                tmp_path,
                f"--distribution={_DEVICES}",
                "--cpu_devices=2",
                *_FLAGS,
            )
        )
        _require_same(tmp_path, folders["one"])


def test_synchronized_batch_normalization(folders):
    # Unsynchronized losses differ by 5%.
    _require_same_metrics(folders["two_9"], folders["one_9"], 9, 1e-3)


def test_an_interrupted_run_goes_on(folders):
    whole, parts = folders["whole"], folders["parts"]
    assert not list(parts.rglob("incomplete.*"))
    _finish(*_start_both(parts, *_INTERRUPTED))
    for name in ("metrics.jsonl", "run.json"):
        expected, found = (
            (x / "11/0" / name).read_bytes() for x in (whole, parts)
        )
        assert found == expected


def test_a_worker_that_ends_and_one_that_never_comes(tmp_path):
    """All at once, for most of their time is spent in importing."""
    flags = [*_FLAGS, "--steps=1000000", "--time_limit=60"]
    alone = _start(
        tmp_path / "alone",
        f"--distribution={_PROCESSES}",
        "--condition=0",
        "--time_limit=5",
        environment=two_workers.environments(_BACKEND)[0],
    )
    lost = _start_both(tmp_path / "lost", *flags, "--eval_every=2")
    metrics = tmp_path / "lost/0/0/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, lost[0])
    lost[1].kill()
    lost[1].communicate()
    line = _said(lost[0])
    assert "another worker ended" in line or "did not answer" in line
    assert not list(tmp_path.rglob("incomplete.*"))
    line = _said(alone)
    assert "did not answer within 5 seconds (time_limit)" in line
    assert not (tmp_path / "alone").exists()


def test_a_worker_that_waits_hears_a_signal(tmp_path):
    environment, _ = two_workers.environments(_BACKEND)
    waiting = _start(
        tmp_path,
        f"--distribution={_PROCESSES}",
        "--condition=0",
        environment=environment,
    )
    address = ("127.0.0.1", _port(environment))

    def listens():
        try:
            socket.create_connection(address).close()
        except OSError:
            return False
        return True

    wait_until(listens, waiting)
    waiting.terminate()
    _, errors = waiting.communicate(timeout=LIMIT)
    assert waiting.returncode == 143, errors
    assert errors.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in errors


_SPREAD = {"distribution": _PROCESSES}
# Settings, arguments of `join`, the environment, and what is said.
_UNUSABLE = {
    "another backend's": (
        {"distribution": "mirrored" if _BACKEND == "torch" else "ddp"},
        (60.0,),
        {},
        "set KERAS_BACKEND=",
    ),
    "no limit": ({}, (0.0,), {}, "time_limit=0"),
    "no end of the limit": ({}, (float("inf"),), {}, "time_limit=inf"),
    "a long limit": ({}, (86400.5,), {}, "86400 at most"),
    "no number": ({}, (float("nan"),), {}, "time_limit=nan"),
    "devices": ({}, (60.0, 2), {}, "cpu_devices=2, distribution=none"),
    "several, each alone": (
        {},
        (60.0,),
        {"WORLD_SIZE": "2"},
        "give --distribution=ddp. Received: distribution=none, WORLD_SIZE=2",
    ),
}
_UNUSABLE |= {
    "tensorflow": {
        "not launched": (_SPREAD, (60.0,), {}, "TF_CONFIG=''"),
        "launched wrongly": (
            _SPREAD,
            (60.0,),
            {"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}, "task": 3}'},
            "multiworker needs TF_CONFIG",
        ),
        "a port that is none": (
            _SPREAD,
            (60.0,),
            {
                "TF_CONFIG": '{"cluster": {"worker": ["a:b"]}, '
                '"task": {"type": "worker", "index": 0}}'
            },
            "multiworker needs TF_CONFIG",
        ),
        "many devices": (
            {"distribution": "mirrored"},
            (60.0, 100_000),
            {},
            "cpu_devices=100000, batch_size=128",
        ),
    },
    "jax": {
        "launched wrongly": (
            _SPREAD,
            (60.0,),
            {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"},
            "KERAS_DISTRIBUTION_PROCESS_ID=None",
        ),
        "unequal shares": (
            _SPREAD | {"batch_size": 7},
            (60.0,),
            {},
            "give a multiple of 2. Received: batch_size=7",
        ),
        "many devices": (
            _SPREAD,
            (60.0, 100_000),
            {},
            "cpu_devices=100000, batch_size=128",
        ),
    },
    "torch": {
        "not launched": (_SPREAD, (60.0,), {}, "Missing: RANK"),
        "launched wrongly": (
            _SPREAD,
            (60.0,),
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


def test_more_replicas_than_images(monkeypatch):
    joined = workers.Workers()
    joined.replicas = 4
    monkeypatch.setattr(distribution, "_workers", lambda *given: joined)
    settings = run_settings.Settings(condition=0, batch_size=3)
    with pytest.raises(ExperimentError) as error:
        with distribution.join(settings, 60.0):
            pass
    assert str(error.value) == (
        "each of the 4 replicas needs an image of every batch: give a larger "
        "one. Received: batch_size=3"
    )


@pytest.mark.parametrize("name", list(_UNUSABLE))
def test_what_cannot_be_used_is_one_line(monkeypatch, name):
    changes, arguments, environment, said = _UNUSABLE[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    settings = run_settings.Settings(condition=0, **changes)
    with pytest.raises(ExperimentError) as error:
        with distribution.join(settings, *arguments):
            pass
    assert said in str(error.value)
    assert "\n" not in str(error.value)


if _BACKEND != "tensorflow":

    def test_keras_layer_is_not_synchronized():
        with pytest.raises(ExperimentError, match="on TensorFlow alone"):
            models.build(
                article.condition(11), layer="keras", synchronized=True
            )


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


# As TensorFlow words it.
_IN_A_GRAPH = """Graph execution error:

Detected at node adam_1/CollectiveReduceV2 defined at (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main

  File "/somewhere/train.py", line 351, in main

Collective ops is aborted by: The following tasks are unhealthy:
/job:worker/replica:0/task:1
\t [[{{node adam_1/CollectiveReduceV2}}]] [Op:__inference__step_of_all_1093]"""


@pytest.mark.parametrize(
    "joining, error, said",
    [
        (
            False,
            _IN_A_GRAPH,
            "a step failed, most likely because another worker ended "
            "(Collective ops is aborted by: The following tasks are "
            "unhealthy: /job:worker/replica:0/task:1): see what the others "
            "say, then start all of them again to go on from the last "
            "checkpoint",
        ),
        (
            True,
            "[Errno 98] Address already in use",
            "a step failed ([Errno 98] Address already in use): see that "
            "each port is free and each address right, and what the others "
            "say; then start all of them again",
        ),
        (
            True,
            "",
            "a step failed (OSError): see that each port is free and each "
            "address right, and what the others say; then start all of them "
            "again",
        ),
    ],
)
def test_what_failed_is_said_with_its_reason(joining, error, said):
    replicas = workers.Replicas(time_limit=60.0)
    replicas.processes = 2
    with pytest.raises(ExperimentError) as raised:
        with replicas.together("a step", joining):
            raise OSError(error)
    assert str(raised.value) == said


# JAX can no longer join in this process, which has made arrays.
if _BACKEND != "jax":

    def test_a_port_in_use_is_one_line(monkeypatch):
        environment, _ = two_workers.environments(_BACKEND)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        settings = run_settings.Settings(condition=0, **_SPREAD)
        with socket.create_server(("", _port(environment))):
            with pytest.raises(ExperimentError) as error:
                with distribution.join(settings, 60.0):
                    pass
        assert "ddress already in use" in str(error.value)
        assert "see that each port is free" in str(error.value)


class _Other(workers.Workers):
    """One of two workers, which the other one answers."""

    processes = 2

    def __init__(self, process, answer=0):
        self.process, self._answer = process, answer

    def sum(self, values):
        self.given = values
        return values + self._answer


def test_workers_with_other_settings():
    facts = {"steps": 4, "learning_rate": 0.1, "dataset": "digits"}
    chief = _Other(0)
    with pytest.raises(ExperimentError):
        chief.require_same(facts)
    assert chief.given.max() < 2**24
    _Other(1, chief.given).require_same(dict(facts))
    with pytest.raises(ExperimentError) as error:
        _Other(1, chief.given).require_same(
            facts | {"steps": 2, "dataset": "cifar10"}
        )
    assert str(error.value).startswith(
        "the workers differ in steps, dataset: start all of them with the "
    )
    assert str(error.value).endswith(
        "Worker 1 received: steps=2, dataset=cifar10"
    )


def test_a_run_of_workers_with_other_data(tmp_path):
    settings = run_settings.Settings(condition=0)
    images = np.zeros((4, 32, 32, 3), np.uint8)
    labels = np.zeros(4, np.int32)
    few = data.Dataset(images, labels, images, labels, "few", "1", "none")
    others = np.ones_like(labels)
    other = dataclasses.replace(few, test_labels=others)
    digests = {few.digest, other.digest}
    digests.add(dataclasses.replace(few, train_images=images + 1).digest)
    assert len(digests) == 3
    chief = _Other(0)
    with pytest.raises(ExperimentError):
        train.run(settings, few, tmp_path, workers=chief)
    worker = _Other(1, chief.given)
    with pytest.raises(ExperimentError, match="the workers differ in dataset"):
        train.run(settings, other, tmp_path, workers=worker)
    assert not list(tmp_path.iterdir())

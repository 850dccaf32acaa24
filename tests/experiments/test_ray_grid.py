"""A grid on Ray's workers, on this machine."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import ExperimentError
from experiments import data
from experiments import ray_grid
from experiments import reproduce
from tests.waiting import LIMIT

_ROOT = Path(__file__).parents[2]
# A worker starts with an interpreter of its own.
_OPTIONS = {"steps": 24, "eval_every": 4, "batch_size": 4}


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


def _files(output, name):
    return {
        str(x.parent.relative_to(output)): x.read_bytes()
        for x in output.glob(f"*/*/{name}")
    }


def _kill_a_trainer(metrics, killed):
    """Kills the process that has the lock once there is a line."""
    while not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    lock = str(metrics.with_name("lock"))
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if lock in map(os.readlink, (process / "fd").iterdir()):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(process.name)
        except OSError:  # it ended, or is another user's
            pass


def test_workers_train_what_one_process_does(few, tmp_path):
    runs = reproduce.grid((9, 11), 1, **_OPTIONS)
    killed = []
    killer = threading.Thread(
        target=_kill_a_trainer,
        args=(tmp_path / "ray/9/0/metrics.jsonl", killed),
        daemon=True,
    )
    killer.start()
    ray, one = tmp_path / "ray", tmp_path / "one"
    (found,) = reproduce.run({ray: runs}, few, ray_grid.LOCAL).values()
    assert len(killed) == 1
    assert reproduce.run({one: runs}, few) == {one: found}
    for name in ("metrics.jsonl", "run.json"):
        assert _files(ray, name) == _files(one, name)
    assert len(_files(ray, "final.weights.h5")) == 2
    assert not _files(ray, "*checkpoint.npz")


@pytest.fixture
def cluster():
    """The address of a cluster of one machine, this one."""
    from ray import cluster_utils

    made = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1}
    )
    yield made.address
    made.shutdown()


def test_a_clusters_workers_train(few, tmp_path, cluster):
    runs = reproduce.grid((9,), 1, **_OPTIONS)
    ray, one = tmp_path / "ray", tmp_path / "one"
    (found,) = reproduce.run({ray: runs}, few, cluster).values()
    assert reproduce.run({one: runs}, few) == {one: found}
    assert _files(ray, "metrics.jsonl") == _files(one, "metrics.jsonl")


def test_an_error_of_a_worker_is_one_line(few, tmp_path, monkeypatch):
    (tmp_path / "9").write_text("no folder can be made here")
    runs = reproduce.grid((9,), 1, **_OPTIONS)
    with pytest.raises(ExperimentError, match="cannot write") as error:
        reproduce.run({tmp_path: runs}, few, ray_grid.LOCAL)
    assert "\n" not in str(error.value)


def test_a_cluster_that_is_not_there(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.reproduce",
            "--dataset=digits",
            "--ray=127.0.0.1:9",
            f"--output={tmp_path}",
        ],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Ray cannot be reached (")
    assert last.endswith("Received: ray=127.0.0.1:9")


def test_without_ray_it_says_what_to_install(few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    runs = reproduce.grid((9,), 1, **_OPTIONS)
    with pytest.raises(ExperimentError, match="install the extra"):
        reproduce.run({tmp_path: runs}, few, ray_grid.LOCAL)

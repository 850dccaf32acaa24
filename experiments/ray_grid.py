"""A grid's runs on Ray: on this machine's cores, or on a cluster.

Each run is a task. Ray starts the task of a worker that died again, on
whatever machine is free, and the run goes on from its last checkpoint. The
result files are those of any other run, so every machine must see the folder
of results, and this clone, under the same paths.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from experiments import ExperimentError
from experiments import data
from experiments import raise_if_interrupted
from experiments.run_settings import Settings

LOCAL = "local"
# How often a run may lose its worker, or its machine.
RETRIES = 5
_REACH_SECONDS = 10.0


def require() -> None:
    """Finds out whether Ray is installed; does not import it.

    Raises:
        ExperimentError: it is not.
    """
    if not find_spec("ray"):
        raise ExperimentError(
            "--ray needs the package ray: install the extra, as in pip "
            "install '.[ray]', or leave --ray out"
        )


def train(
    jobs: Sequence[tuple[Path, Settings]],
    dataset: data.Dataset,
    train_one: Callable[[Path, Settings, data.Dataset], float],
    address: str,
    on_steps: Callable[[int], None],
) -> dict[tuple[Path, Settings], float]:
    """Trains what is left to do of some runs.

    Args:
        jobs: of each, its folder of results and what to do.
        dataset: what to train on; the workers are sent it.
        train_one: does a job in a worker, and returns its final test
            accuracy (0 to 1); a function of a module.
        address: of a cluster, as "10.0.0.1:6379" or "auto" on one of its
            machines, or "local" for a Ray that is started here and ends with
            this call.
        on_steps: called with the steps of each run that is finished.

    Returns:
        What `train_one` returned of each job.

    Raises:
        ExperimentError: Ray is not installed, the cluster cannot be reached,
            a run cannot be trained, or its workers died too often.
        KeyboardInterrupt: the program was told to stop; it says how to go on.
    """
    require()
    import ray

    names = ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL")
    environment = {x: os.environ[x] for x in names if x in os.environ}
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        if address != LOCAL:
            _reach(address)
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            logging_level="ERROR",
            log_to_driver=False,
            **({"include_dashboard": False} if address == LOCAL else {}),
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ExperimentError(
            f"Ray cannot be reached ({reason}): give the address of a running "
            f"cluster, or --ray={LOCAL}. Received: ray={address}"
        ) from error
    try:
        return _train(ray, jobs, dataset, train_one, on_steps)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "Ray's tasks were stopped; the same command goes on from their "
            "last checkpoints"
        ) from None
    except ray.exceptions.RayTaskError as error:
        reason = str(error.cause).split("\n")[0]
        raise ExperimentError(reason) from error
    except ray.exceptions.RayError as error:
        reason = str(error).split("\n")[0]
        raise ExperimentError(
            f"a run lost its worker {RETRIES + 1} times ({reason}): see Ray's "
            "logs; the same command goes on from the last checkpoints"
        ) from error
    finally:
        ray.shutdown()


def _reach(address):
    """Tries the address: Ray itself would try for minutes, then abort."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()


def _train(ray, jobs, dataset, train_one, on_steps):
    # A run needs a GPU where there are any.
    gpus = int(bool(ray.cluster_resources().get("GPU")))
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(train_one)
    shared = ray.put(dataset)
    pending = {
        task.remote(output.absolute(), settings, shared): (output, settings)
        for output, settings in jobs
    }
    final = {}
    while pending:
        raise_if_interrupted()
        done, _ = ray.wait(list(pending), timeout=1.0)
        for reference in done:
            job = pending.pop(reference)
            final[job] = ray.get(reference)
            on_steps(job[1].steps)
    return final

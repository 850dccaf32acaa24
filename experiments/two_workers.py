"""Starts two workers of one run on this machine, to try a distribution out.

    python -m experiments.two_workers --condition=11 --steps=20

The flags are those of `experiments.train`, which both workers run: by
multiworker on TensorFlow, data_parallel on JAX and ddp on PyTorch. What the
chief writes is shown; the other's last line is, should it fail.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import flags

from experiments import ExperimentError
from experiments import distribution
from experiments import interruptions_deferred
from experiments import launch
from experiments import raise_if_interrupted
from experiments import require_backend
from experiments import signal_received
from experiments import train

# How long a worker has to end by itself, once the other has failed.
_GRACE_SECONDS = 10.0
_PORTS = range(20_000, 32_768)


def environments(backend: str) -> list[dict[str, str]]:
    """Returns what to add to the environment of each of the two workers."""
    ports = free_ports(2)
    host = "127.0.0.1"
    if backend == "tensorflow":
        cluster = {"worker": [f"{host}:{port}" for port in ports]}
        return [
            {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": cluster,
                        "task": {"type": "worker", "index": index},
                    }
                )
            }
            for index in range(2)
        ]
    if backend == "jax":
        return [
            {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"{host}:{ports[0]}",
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
            }
            for index in range(2)
        ]
    return [
        {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(ports[0]),
            "WORLD_SIZE": "2",
            "RANK": str(index),
            "LOCAL_RANK": str(index),
        }
        for index in range(2)
    ]


def run(backend: str, arguments: list[str]) -> None:
    """Trains in two processes.

    Args:
        backend: "tensorflow", "jax" or "torch".
        arguments: flags of `experiments.train`, less the distribution.

    Raises:
        ExperimentError: a worker failed.
        KeyboardInterrupt: as for a program; the workers were told, too.
    """
    name = {
        "tensorflow": "multiworker",
        "jax": "data_parallel",
        "torch": "ddp",
    }[backend]
    command = [sys.executable, "-m", "experiments.train", *arguments]
    command.append(f"--distribution={name}")
    with tempfile.TemporaryFile("w+") as output:
        shown = [{}, {"stdout": output, "stderr": output}]
        workers = []
        try:
            # Cut short, the start of a worker would leave one unknown to us.
            with interruptions_deferred():
                for added, streams in zip(environments(backend), shown):
                    raise_if_interrupted()
                    worker = subprocess.Popen(
                        command,
                        env=os.environ | added,
                        # Ctrl-C comes by this process, once.
                        start_new_session=True,
                        **streams,
                    )
                    workers.append(worker)
            raise_if_interrupted()
            failed = _first_failure(workers)
        except KeyboardInterrupt:
            _end(workers, signal_received())
            raise
        finally:
            _end(workers, signal.SIGTERM)
        if failed is None:
            return
        said = ""
        if failed == 1:
            output.seek(0)
            said = f": {([''] + output.read().splitlines())[-1]}"
        raise ExperimentError(
            f"worker {failed} of 0 and 1 ended with exit code "
            f"{workers[failed].returncode}{said}"
        )


def _first_failure(workers):
    """Waits for all to end well, or for one not to; returns its number."""
    while any(worker.poll() is None for worker in workers):
        for number, worker in enumerate(workers):
            if worker.returncode:
                # The other one is about to notice, and to say so.
                _wait(workers)
                return number
        time.sleep(0.1)
    return next((x for x, worker in enumerate(workers) if worker.poll()), None)


def _end(workers, number):
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
    _wait(workers)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def _wait(workers):
    until = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < until and any(x.poll() is None for x in workers):
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine on which nobody listens.

    None is of those that systems give to whoever asks for any, from 32,768
    on: such a one could be given away before it is listened on.
    """
    found = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def main(argv):
    del argv
    distribution.require_several_processes()
    train.check_output(train.from_flags(), flags.FLAGS.output)
    require_backend()
    import keras

    run(keras.backend.backend(), sys.argv[1:])


if __name__ == "__main__":
    train.define_flags()
    launch(main)

"""How a run is spread over devices and processes, on the frameworks' engines.

    none            one device
    mirrored        TensorFlow, `tf.distribute.MirroredStrategy`: all GPUs of
                    this process, or its logical CPUs
    multiworker     TensorFlow, `tf.distribute.MultiWorkerMirroredStrategy`:
                    the processes that TF_CONFIG names
    data_parallel   JAX, `keras.distribution.DataParallel`: all devices, of
                    the processes that KERAS_DISTRIBUTION_... name
    ddp             PyTorch, `DistributedDataParallel`: the processes that
                    torchrun started

Each replica trains on its share of every batch, whose images are those of
`none`, and a step is that of the mean loss over the whole batch. The chief,
which is the first process, keeps the run's folder.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from absl import flags

from experiments import SIGNALS
from experiments import ExperimentError
from experiments import machine
from experiments import run_settings
from experiments import signal_received
from experiments.distribution.workers import INTERRUPTED
from experiments.distribution.workers import Workers
from experiments.distribution.workers import end

# Of several processes. Never given up, for their destructors may wait for
# others.
_joined = []
# How long an interrupted process has to end by itself.
_GRACE_SECONDS = 5.0
_DAY = 24 * 60 * 60


def define_flags() -> None:
    """Defines the flags that say how a run is spread."""
    flags.DEFINE_enum(
        "distribution",
        "none",
        list(run_settings.DISTRIBUTIONS),
        "What spreads the run: mirrored and multiworker are TensorFlow's, "
        "data_parallel is JAX's, ddp is PyTorch's.",
    )
    flags.DEFINE_bool(
        "synchronized",
        False,
        "Normalize with the moments of the batch over all replicas.",
    )
    flags.DEFINE_float(
        "time_limit",
        60.0,
        "Seconds to wait for another worker, at the start and in every step; "
        "then the program ends with an error.",
    )
    flags.DEFINE_integer(
        "cpu_devices",
        None,
        "Train on so many logical devices of the CPU, to try mirrored and "
        "data_parallel out.",
    )


@contextlib.contextmanager
def join(
    settings: run_settings.Settings,
    time_limit: float,
    cpu_devices: int | None = None,
) -> Iterator[Workers]:
    """Joins this process to the others of a run, if there are any.

    To be called before the framework has made a tensor.

    Args:
        settings: what to do.
        time_limit: seconds to wait for the other processes, whenever they
            are waited for. When they are over this process says so, and ends.
        cpu_devices: how many logical devices the CPU is to be, for
            "mirrored" and "data_parallel".

    Raises:
        ExperimentError: the distribution is another backend's, the launch
            does not say who takes part, the others cannot be reached, or the
            batch has fewer images than there are replicas.
    """
    import keras

    check(settings, time_limit, cpu_devices, keras.backend.backend())
    with contextlib.ExitStack() as stack:
        waiting = contextlib.ExitStack()
        if _several(settings.distribution):
            waiting = stack.enter_context(_ending_though_waiting())
        workers = _workers(settings.distribution, time_limit, cpu_devices)
        if workers.processes > 1:
            # TensorFlow and JAX have taken SIGTERM for their own ends.
            for number in SIGNALS:
                signal.signal(number, signal.getsignal(number))
            stack.enter_context(_leaving_at_once())
            _joined.append(workers)
        else:
            waiting.close()
        _check_batch(settings, workers.replicas)
        yield workers
        workers.leave()


def check(
    settings: run_settings.Settings,
    time_limit: float,
    cpu_devices: int | None,
    backend: str | None,
) -> None:
    """Finds out whether `join` can be asked for that; imports no framework.

    Args:
        settings, time_limit, cpu_devices: as for `join`.
        backend: Keras's; None where it is not known yet.

    Raises:
        ExperimentError: it cannot be, on this backend or this system.
    """
    name = settings.distribution
    if _several(name):
        require_several_processes()
    wanted = run_settings.DISTRIBUTIONS[name]
    if backend is not None and wanted not in (None, backend):
        raise ExperimentError(
            f"distribution={name} runs on the backend {wanted}: set "
            f"KERAS_BACKEND={wanted}, or give another. Received: {backend}"
        )
    size = os.environ.get("WORLD_SIZE") or "1"
    if name == "none" and size != "1":
        raise ExperimentError(
            "torchrun has started several processes, and each would train "
            "alone in one folder: give --distribution=ddp. Received: "
            f"distribution=none, WORLD_SIZE={size}"
        )
    if not 0 < time_limit <= _DAY:
        raise ExperimentError(
            f"time_limit is a positive number of seconds, {_DAY} at most. "
            f"Received: time_limit={time_limit}"
        )
    if cpu_devices is None:
        return
    if cpu_devices < 1 or name not in ("mirrored", "data_parallel"):
        raise ExperimentError(
            "cpu_devices is at least 1, for mirrored and data_parallel. "
            f"Received: cpu_devices={cpu_devices}, distribution={name}"
        )
    if cpu_devices > settings.batch_size:
        # Before so many are made, which may take all memory.
        raise ExperimentError(
            "each device needs an image of every batch: give fewer devices. "
            f"Received: cpu_devices={cpu_devices}, "
            f"batch_size={settings.batch_size}"
        )


def _several(name):
    """Whether a distribution may have other processes to wait for."""
    launched = os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES")
    return name in ("multiworker", "ddp") or (
        name == "data_parallel" and bool(launched)
    )


def require_several_processes() -> None:
    """Finds out whether this system can train in several processes.

    Raises:
        ExperimentError: it cannot. A worker that waits for the others must
            hear of signals, which Windows has not.
    """
    if not hasattr(signal, "SIGHUP"):
        raise ExperimentError(
            "several processes train together on Linux and macOS alone: "
            "train in one, with --distribution=none. Received: "
            f"platform={sys.platform}"
        )


def _workers(name, time_limit, cpu_devices):
    if name == "mirrored":
        from experiments.distribution import tensorflow

        return tensorflow.mirrored(cpu_devices)
    if name == "multiworker":
        from experiments.distribution import tensorflow

        return tensorflow.multiworker(time_limit)
    if name == "data_parallel":
        from experiments.distribution import jax

        return jax.data_parallel(time_limit, cpu_devices)
    if name == "ddp":
        from experiments.distribution import torch

        return torch.ddp(time_limit)
    return one_device()


def one_device() -> Workers:
    """Returns what trains in this process alone, on one device."""
    # On a CPU there is no trip to save, and XLA's convolutions take nine
    # times as long within JAX's loop.
    if "cpu" in machine.device().lower():
        return Workers()
    from experiments import device_loop

    return device_loop.of_backend()


def _check_batch(settings, replicas):
    size, name = settings.batch_size, settings.distribution
    if size < replicas:
        raise ExperimentError(
            f"each of the {replicas} replicas needs an image of every batch: "
            f"give a larger one. Received: batch_size={size}"
        )
    if name == "data_parallel" and size % replicas:
        raise ExperimentError(
            f"data_parallel cuts a batch into {replicas} equal shares: give a "
            f"multiple of {replicas}. Received: batch_size={size}"
        )


@contextlib.contextmanager
def _ending_though_waiting():
    """Has a signal end this process though it waits in native code.

    Python's own handler comes when that returns: TensorFlow would go on
    waiting for a worker that the same Ctrl-C has ended.
    """
    with contextlib.ExitStack() as until:
        read, write = os.pipe()
        until.callback(os.close, write)
        os.set_blocking(write, False)
        until.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write))

        def wait():
            with open(read, "rb", buffering=0) as signals:
                number = signals.read(1)
            if number:
                time.sleep(_GRACE_SECONDS)
                print(INTERRUPTED, file=sys.stderr)
                end(128 + number[0])

        threading.Thread(target=wait, daemon=True).start()
        yield until


@contextlib.contextmanager
def _leaving_at_once():
    """Has a process that fails end without taking leave of the others.

    The frameworks would wait for processes that may be waiting for this one.
    """
    try:
        yield
    except BaseException as error:
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = 128 + signal_received()
        atexit.register(end, code)
        raise

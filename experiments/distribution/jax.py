"""JAX: `keras.distribution.DataParallel`, in one process or in several.

Arrays are global: a step is one computation on the whole batch, and XLA
places what the devices exchange. So the moments of batch normalization are
those of the whole batch, synchronized or not, and dropout is that of `none`.
"""

import os

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from experiments import ExperimentError
from experiments.distribution.workers import Replicas

_PREFIX = "KERAS_DISTRIBUTION_"


def data_parallel(time_limit, cpu_devices):
    """Replicas on all devices of all processes."""
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    workers = _DataParallel(time_limit)
    launched = _launched()
    if launched:
        address, workers.processes, workers.process = launched
        with workers.together(
            f"waiting for the workers at {address}", joining=True
        ):
            # keras.distribution.initialize has no time limits to give. JAX's
            # own come later than ours: they end the process without a word.
            jax.distributed.initialize(
                address,
                workers.processes,
                workers.process,
                initialization_timeout=int(2 * time_limit) + 1,
                heartbeat_timeout_seconds=int(2 * time_limit) + 1,
            )
            workers.use(cpu_devices)
            workers.sum(np.zeros(1))
    else:
        workers.use(cpu_devices)
    return workers


def _launched():
    """Returns coordinator, processes, process; None if none is named."""
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    given = {_PREFIX + x: os.environ.get(_PREFIX + x) for x in names}
    if not any(given.values()):
        return None
    try:
        addresses, processes, process = given.values()
        # The coordinator is the first, as for keras.distribution.initialize.
        address = addresses.split(",")[0]
        processes, process = int(processes), int(process)
        port = int(address.rpartition(":")[2])
        if ":" not in address or process not in range(processes):
            raise ValueError
        if port not in range(1, 2**16):
            raise ValueError
    except (AttributeError, TypeError, ValueError) as error:
        received = ", ".join(f"{name}={x}" for name, x in given.items())
        raise ExperimentError(
            "data_parallel in several processes needs the coordinator's "
            "address and port, how many processes there are, and this one's "
            f"number from 0. Received: {received}"
        ) from error
    return address, processes, process


class _DataParallel(Replicas):
    def use(self, cpu_devices):
        devices = jax.devices("cpu" if cpu_devices else None)
        self.replicas = len(devices)
        self._own = [
            replica
            for replica, device in enumerate(devices)
            if device.process_index == jax.process_index()
        ]
        self._distribution = keras.distribution.DataParallel(
            devices=[f"{x.platform}:{x.id}" for x in devices]
        )

    def train_on_batch(self, inputs, labels):
        with self.together("a training step"), self._scope():
            logs = self._replicated.train_on_batch(
                self._shares(inputs), self._shares(labels), return_dict=True
            )
            # JAX computes later, and what fails then does so when it is read.
            return {name: float(value) for name, value in logs.items()}

    def leave(self):
        if self.processes > 1:
            with self.together("taking leave"):
                jax.distributed.shutdown()

    def _shares(self, batch):
        return np.concatenate([self.share(batch, x) for x in self._own])

    def _scope(self):
        return self._distribution.scope()

    def _sum(self, values):
        gathered = multihost_utils.process_allgather(values)
        return np.sum(gathered, axis=0, dtype=values.dtype)

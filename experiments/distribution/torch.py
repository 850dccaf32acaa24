"""PyTorch: `DistributedDataParallel`, as torchrun launches it."""

import atexit
import datetime
import os

import keras
import numpy as np
import torch
from torch import distributed

from experiments import ExperimentError
from experiments.distribution.workers import Replicas
from experiments.distribution.workers import dropout_state
from experiments.distribution.workers import dropout_states
from experiments.distribution.workers import end


def ddp(time_limit):
    """One replica in each process that torchrun started."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ExperimentError(
            "ddp is launched by torchrun, as torchrun --nproc_per_node=2 -m "
            f"experiments.train --distribution=ddp. Missing: {missing[0]}"
        )
    try:
        rank, size, _, port = (os.environ[name] for name in names)
        rank, size, port = int(rank), int(size), int(port)
        local = int(os.environ.get("LOCAL_RANK", 0))
        if rank not in range(size) or port not in range(2**16) or local < 0:
            raise ValueError
    except ValueError as error:
        received = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise ExperimentError(
            f"torchrun's variables do not fit together. Received: {received}"
        ) from error
    return _Ddp(rank, size, local, time_limit)


class _Ddp(Replicas):
    def __init__(self, rank, size, local, time_limit):
        super().__init__(time_limit)
        self.process, self.processes, self.replicas = rank, size, size
        cuda = torch.cuda.is_available()
        if cuda:
            if local >= torch.cuda.device_count():
                raise ExperimentError(
                    f"this machine has {torch.cuda.device_count()} GPUs: "
                    "start no more processes on it. Received: "
                    f"LOCAL_RANK={local}"
                )
            torch.cuda.set_device(local)
        self._device = f"cuda:{local}" if cuda else "cpu"
        with self.together("waiting for the workers of torchrun", joining=True):
            distributed.init_process_group(
                "nccl" if cuda else "gloo",
                timeout=datetime.timedelta(seconds=2 * time_limit),
            )
            self.sum(np.zeros(1))

    def train_on_batch(self, inputs, labels):
        images = len(labels)
        with self.together("a training step"):
            inputs, labels = (
                torch.from_numpy(self.share(x, self.process)).to(self._device)
                for x in (inputs, labels)
            )
            model = self._replicated
            model.zero_grad()
            logits = self._ddp(inputs, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, logits, from_logits=True
            )
            loss = losses.sum() / images
            # DDP divides the sum of the gradients by the number of replicas.
            (loss * self.replicas).backward()
            variables = model.trainable_variables
            with torch.no_grad():
                model.optimizer.apply(
                    [x.value.grad for x in variables], variables
                )
                right = (logits.argmax(dim=-1) == labels).sum() / images
                means = torch.stack([loss, right])
                distributed.all_reduce(means)
            loss, accuracy = means.tolist()
            return {"loss": loss, "accuracy": accuracy}

    def leave(self):
        self.sum(np.zeros(1))
        # The group's destructor waits, holding Python's lock, for threads
        # that may be waiting for that lock.
        atexit.register(end, 0)

    def _start(self):
        self._ddp = torch.nn.parallel.DistributedDataParallel(
            self._replicated
        )
        for variable in dropout_states(self._replicated):
            value = keras.ops.convert_to_numpy(variable)
            variable.assign(dropout_state(value, self.process))

    def _sum(self, values):
        total = torch.from_numpy(np.array(values)).to(self._device)
        distributed.all_reduce(total)
        return total.cpu().numpy()

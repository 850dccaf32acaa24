"""What the processes of a run do together; here for one process, one device."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tqdm

from experiments import ExperimentError
from experiments import data
from experiments import evaluation
from experiments import raise_if_interrupted
from experiments.checkpoint import state

if TYPE_CHECKING:
    import keras


# What an interrupted process says that can do no more.
INTERRUPTED = "interrupted: the same command goes on from the last checkpoint"


class Workers:
    """One process on one device: nothing is spread.

    Attributes:
        process: this process's number, from 0; that of the chief is 0.
        processes: how many there are.
        replicas: how many replicas of the model train, in all processes.
    """

    process = 0
    processes = 1
    replicas = 1

    @property
    def chief(self) -> bool:
        return self.process == 0

    def start(
        self, model: keras.Model, build: Callable[[], keras.Model]
    ) -> None:
        """Makes the replicas, in the state that the chief's model has.

        Args:
            model: a compiled model, which stays this process's own.
            build: makes another one of its kind.
        """
        self._model = model

    def take_steps(
        self, batches: data.Batches, step: int, until: int
    ) -> list[dict[str, float]]:
        """Takes training steps, as many as it likes to take together.

        Args:
            batches: every process has all of them.
            step: the first one's number; how many are done.
            until: how many are done at most then, more than `step`.

        Returns:
            "loss" and "accuracy" of each, means over its batch.
        """
        return [self.train_on_batch(*batches[step])]

    def train_on_batch(
        self, inputs: np.ndarray, labels: np.ndarray
    ) -> dict[str, float]:
        """Takes a training step on a batch that every process has whole.

        Returns:
            "loss" and "accuracy", means over the batch.
        """
        return self._model.train_on_batch(inputs, labels, return_dict=True)

    def collect(self) -> None:
        """Gives the model of `start` the state of the replicas."""

    def evaluate(
        self, images: np.ndarray, labels: np.ndarray
    ) -> dict[str, float]:
        """Returns what `evaluation.evaluate` does, after `collect`."""
        return evaluation.evaluate(self._model, images, labels)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Adds up, element by element, what the processes give."""
        return values

    def from_chief(self, values: np.ndarray) -> np.ndarray:
        """Returns the chief's values, which others give in the same shape."""
        # Added to zeros they stay what they are.
        return self.sum(values if self.chief else np.zeros_like(values))

    def require_same(self, facts: dict[str, object]) -> None:
        """Finds out whether all processes were given the same.

        Args:
            facts: from names, which all processes have, to what this one has
                been given; compared by `repr`.

        Raises:
            ExperimentError: another process was given something else.
        """
        table = np.zeros((self.processes, len(facts)), np.int32)
        # Of 24 bits each, which no backend rounds.
        table[self.process] = [
            int(hashlib.sha256(repr(x).encode()).hexdigest()[:6], 16)
            for x in facts.values()
        ]
        same = (self.sum(table) == table[self.process]).all(axis=0)
        if not same.all():
            names = [x for x, equal in zip(facts, same) if not equal]
            received = ", ".join(f"{x}={facts[x]}" for x in names)
            raise ExperimentError(
                f"the workers differ in {', '.join(names)}: start all of them "
                "with the same flags, the same data and the same code. "
                f"Worker {self.process} received: {received}"
            )

    def leave(self) -> None:
        """Ends what the processes do together, and may end this process.

        The program's work is done: its exit code is 0.
        """


class Replicas(Workers):
    """What the three frameworks' replicas have in common.

    Each framework's class adds `_sum`, which does for several processes what
    `sum` says.

    Args:
        time_limit: seconds to wait for the other processes.
    """

    def __init__(self, time_limit: float | None = None):
        self._time_limit = time_limit

    def start(self, model, build):
        self._model = model
        values = [self.from_chief(_numpy(x)) for x in state(model)]
        with self._scope():
            self._replicated = build()
            copies = state(self._replicated)
            for variable, value in zip(copies, values, strict=True):
                variable.assign(value)
        self._start()

    def collect(self):
        with self.together("reading the weights"):
            values = [_numpy(x) for x in state(self._replicated)]
        for variable, value in zip(state(self._model), values, strict=True):
            variable.assign(value)
        # Replicas may differ in these, and all evaluate one model.
        for variable in self._model.non_trainable_variables:
            variable.assign(self.from_chief(_numpy(variable)))

    def sum(self, values):
        if self.processes == 1:
            return values
        with self.together("adding up"):
            return self._sum(values)

    def share(self, batch: np.ndarray, replica: int) -> np.ndarray:
        """Returns a replica's part of a batch; sizes differ by 1 at most."""
        return np.array_split(batch, self.replicas)[replica]

    @contextlib.contextmanager
    def together(self, doing: str, joining: bool = False):
        """Limits the time of what needs the other processes.

        The frameworks' own limits differ, and JAX's end the process without a
        word that a user understands. Code that waits in native code cannot be
        made to raise anything, so the process ends.

        Args:
            doing: what is done, for the line that says why it ended.
            joining: whether the processes have yet to find one another.

        Raises:
            ExperimentError: it failed; most likely another process ended.
        """
        if self.processes == 1:
            yield
            return
        timer = threading.Timer(
            self._time_limit, _give_up, [doing, self._time_limit]
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        except ExperimentError:
            raise
        except Exception as error:  # each framework has its own
            raise_if_interrupted()
            if joining:
                raise ExperimentError(
                    f"{doing} failed ({_reason(error)}): see that each port is "
                    "free and each address right, and what the others say; "
                    "then start all of them again"
                ) from error
            raise ExperimentError(
                f"{doing} failed, most likely because another worker ended "
                f"({_reason(error)}): see what the others say, then start all "
                "of them again to go on from the last checkpoint"
            ) from error
        finally:
            timer.cancel()

    def _scope(self):
        return contextlib.nullcontext()

    def _start(self):
        pass


def no_answer(doing: str, seconds: float) -> str:
    """Returns the line that a process ends with when its time is over."""
    return (
        f"error: {doing}: another worker did not answer within {seconds:g} "
        "seconds (time_limit); start all of them again to go on from the "
        "last checkpoint"
    )


def _reason(error):
    """Returns what a framework's error says, in a line."""
    text = str(error)
    # TensorFlow's says first where a node was made, then what happened; and
    # names nodes and operations.
    text = re.sub(r'(?s).*\n  File "[^\n]*', "", text)
    text = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*", "", text)
    return " ".join(text.split())[:200] or type(error).__name__


def _give_up(doing, seconds):
    tqdm.tqdm.write(no_answer(doing, seconds), file=sys.stderr)
    end(1)


def end(code: int) -> None:
    """Ends this process here, without what Python does at its end.

    The frameworks' destructors may wait for other processes, or for threads
    that wait for Python's lock.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def dropout_states(model: keras.Model) -> list[keras.Variable]:
    """Returns what dropout's random generators have drawn from."""
    return [
        layer.seed_generator.state
        for layer in model.layers
        if hasattr(layer, "seed_generator")
    ]


def dropout_state(value: np.ndarray, replica: int) -> np.ndarray:
    """Returns a replica's own state of dropout's random generator.

    Args:
        value: the chief's: the seed, and how often was drawn.
        replica: its number; 0 has the chief's.
    """
    if not replica:
        return value
    seed, drawn = value
    # Not the next whole number: on PyTorch Keras adds the two up.
    word = np.random.SeedSequence([int(seed), replica]).generate_state(1)[0]
    return np.array([word >> 1, drawn], value.dtype)


def _numpy(variable):
    import keras

    return keras.ops.convert_to_numpy(variable)

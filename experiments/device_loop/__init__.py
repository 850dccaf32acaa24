"""Steps without data or reports going to and fro: many are one call.

The images stay on the device. A call gathers the batches of its steps, takes
the steps and returns what each reported. How many steps a call has changes no
number. Evaluation is one call too.

JAX and TensorFlow compile a call as one computation; PyTorch is given its
steps one after another, and no report is waited for before the last.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable

import keras
import numpy as np

from experiments import data
from experiments import evaluation
from experiments.distribution.workers import Workers

# A call ends soon, so that a program that is told to stop does.
_CALL_SECONDS = 1.0
_MOST_STEPS = 512


def of_backend() -> DeviceLoop:
    """Returns the loop of Keras's backend."""
    backend = keras.backend.backend()
    if backend == "jax":
        from experiments.device_loop.jax import JaxLoop

        return JaxLoop()
    if backend == "torch":
        from experiments.device_loop.torch import TorchLoop

        return TorchLoop()
    from experiments.device_loop.tensorflow import TensorFlowLoop

    return TensorFlowLoop()


class DeviceLoop(Workers, abc.ABC):
    """One process on one device."""

    def start(self, model, build):
        super().start(model, build)
        self._steps_a_call = 1
        self._train_data = None
        self._test_data = None
        self._begin()

    def take_steps(self, batches, step, until):
        if self._train_data is None:
            self._train_data = self._placed(batches.images, batches.labels)
            self._compile_steps(batches.prepare)
        count = min(until - step, self._steps_a_call)
        # Of one shape, for which the loop is compiled.
        rows = np.zeros((_MOST_STEPS, batches.size), np.int32)
        rows[:count] = [batches.rows(x) for x in range(step, step + count)]
        began = time.perf_counter()
        reports = self._take(*self._train_data, rows, count)[:count]
        seconds = (time.perf_counter() - began) / count
        self._steps_a_call = int(
            np.clip(_CALL_SECONDS / seconds, 1, _MOST_STEPS)
        )
        return [_named(report) for report in reports]

    def evaluate(self, images, labels):
        if self._test_data is None:
            self._test_data = self._placed(images, labels)
            self._compile_test()
        size = evaluation.EVALUATION_BATCH
        whole = len(labels) // size * size
        rows = np.arange(len(labels), dtype=np.int32)
        mean = evaluation.Mean()
        for part in (rows[:whole].reshape(-1, size), rows[np.newaxis, whole:]):
            if part.size:
                for report in self._test(*self._test_data, part):
                    mean.add(_named(report), part.shape[1])
        return mean.values()

    def _begin(self):
        """Makes of the model's state what the loop goes on from."""

    @abc.abstractmethod
    def _placed(self, images, labels):
        """Returns images and labels as they are on the device."""

    @abc.abstractmethod
    def _compile_steps(self, prepare: data.Inputs) -> None:
        """Makes ready what `_take` calls."""

    @abc.abstractmethod
    def _take(self, images, labels, rows, count) -> np.ndarray:
        """Takes `count` steps; returns their loss and accuracy, (..., 2).

        Args:
            images, labels: what `_placed` returned.
            rows: which images each step's batch has, int32 (at least
                `count`, batch).
            count: int.
        """

    @abc.abstractmethod
    def _compile_test(self) -> None:
        """Makes ready what `_test` calls."""

    @abc.abstractmethod
    def _test(self, images, labels, rows) -> np.ndarray:
        """Returns loss and accuracy of each batch in test, (batches, 2)."""


def on_device(prepare: data.Inputs) -> Callable:
    """Returns what does to a tensor of images what `prepare` does to arrays."""
    if prepare.shift is None:
        return lambda images: keras.ops.cast(images, "float32")
    # Once: PyTorch waits for its device when it hands a number over.
    shift = keras.ops.convert_to_tensor(prepare.shift)
    factor = keras.ops.convert_to_tensor(prepare.factor)
    return lambda images: (keras.ops.cast(images, "float32") - shift) * factor


def report(labels, logits, own_losses):
    """Returns the mean loss and accuracy of a batch, as Keras does.

    What the layers add to the loss, as `add_loss` and regularizers do, is in
    it.
    """
    losses = keras.ops.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    found = keras.ops.argmax(logits, axis=-1)
    right = keras.ops.equal(found, keras.ops.cast(labels, found.dtype))
    total = sum(own_losses, keras.ops.sum(losses) / labels.shape[0])
    return total, keras.ops.mean(keras.ops.cast(right, "float32"))


def _named(report):
    loss, accuracy = report
    return {"loss": float(loss), "accuracy": float(accuracy)}

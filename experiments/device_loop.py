"""Steps without a trip to the host: JAX takes many in one computation.

The images stay on the device as uint8. A call of the compiled loop gathers
the batches of its steps, takes the steps and returns what each reported; how
many steps a call has changes no number, for the loop is compiled once for any
number of them. Evaluation is one computation too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import keras
import numpy as np

from experiments import checkpoint
from experiments import evaluation
from experiments.distribution.workers import Workers

# A call ends soon, so that a program that is told to stop does.
_CALL_SECONDS = 1.0
_MOST_STEPS = 512


class DeviceLoop(Workers):
    """One process on one device of JAX."""

    def start(self, model, build):
        super().start(model, build)
        self._steps_a_call = 1
        self._images = None
        self._tested = None
        self._take = None
        self._state = [
            [jnp.copy(x.value) for x in variables]
            for variables in _variables(model)
        ]

    def take_steps(self, batches, step, until):
        if self._images is None:
            self._images = jnp.asarray(batches.images)
            self._labels = jnp.asarray(batches.labels)
            self._take = _compiled_steps(self._model, batches.prepare)
        count = min(until - step, self._steps_a_call)
        # Of one shape, for which the loop is compiled.
        rows = np.zeros((_MOST_STEPS, batches.size), np.int32)
        rows[:count] = [batches.rows(x) for x in range(step, step + count)]
        began = time.perf_counter()
        self._state, reports = self._take(
            self._state, self._images, self._labels, rows, count
        )
        reports = np.asarray(reports)[:count]
        seconds = (time.perf_counter() - began) / count
        self._steps_a_call = int(
            np.clip(_CALL_SECONDS / seconds, 1, _MOST_STEPS)
        )
        return [
            {"loss": float(loss), "accuracy": float(accuracy)}
            for loss, accuracy in reports
        ]

    def collect(self):
        # Copies: the next step takes the memory of the state.
        for variables, values in zip(_variables(self._model), self._state):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(jnp.copy(value))

    def evaluate(self, images, labels):
        if self._tested is None:
            self._tested = _compiled_test(self._model, images, labels)
        mean = evaluation.Mean()
        for logs, count in self._tested(self._state[:2]):
            mean.add(logs, count)
        return mean.values()


def _variables(model):
    checkpoint.state(model)  # makes the optimizer's
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
    )


def _report(labels, logits, own_losses):
    """Returns the mean loss and accuracy of a batch, as Keras does.

    What the layers add to the loss, as `add_loss` and regularizers do, is in
    it.
    """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    right = jnp.argmax(logits, axis=-1) == labels
    total = sum(own_losses, loss(labels, logits))
    return total, jnp.mean(right.astype(jnp.float32))


def _compiled_steps(model: keras.Model, prepare: Callable) -> Callable:
    optimizer = model.optimizer

    def loss_and_rest(trainable, others, images, labels):
        logits, others, own_losses = model.stateless_call(
            trainable, others, images, training=True, return_losses=True
        )
        loss, accuracy = _report(labels, logits, own_losses)
        return loss, (others, accuracy)

    def take(state, images, labels, rows, count):
        def step(number, carry):
            (trainable, others, of_optimizer), reports = carry
            batch = rows[number]
            (loss, (others, accuracy)), gradients = jax.value_and_grad(
                loss_and_rest, has_aux=True
            )(trainable, others, prepare(images[batch]), labels[batch])
            trainable, of_optimizer = optimizer.stateless_apply(
                of_optimizer, gradients, trainable
            )
            reports = reports.at[number].set(jnp.stack([loss, accuracy]))
            return [trainable, others, of_optimizer], reports

        reports = jnp.zeros((len(rows), 2), jnp.float32)
        return jax.lax.fori_loop(0, count, step, (state, reports))

    return jax.jit(take, donate_argnums=0)


def _compiled_test(model, images, labels):
    """Returns a function from weights to (report, images) of each batch."""
    size = evaluation.EVALUATION_BATCH
    whole = len(labels) // size * size
    parts = []
    for rows, batch in (
        (slice(whole), size),
        (slice(whole, None), len(labels) - whole),
    ):
        if len(labels[rows]):
            shapes = ((-1, batch, *images.shape[1:]), (-1, batch))
            values = (images[rows], labels[rows])
            parts.append(tuple(map(jnp.reshape, values, shapes)))

    @jax.jit
    def test(weights, part):
        def one(batch):
            logits, _, own_losses = model.stateless_call(
                *weights, batch[0], training=False, return_losses=True
            )
            return jnp.stack(_report(batch[1], logits, own_losses))

        return jax.lax.map(one, part)

    def tested(weights):
        for part in parts:
            for loss, accuracy in np.asarray(test(weights, part)):
                logs = {"loss": float(loss), "accuracy": float(accuracy)}
                yield logs, part[1].shape[1]

    return tested

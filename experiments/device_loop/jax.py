"""JAX's loop: the state of the model goes through it as arrays.

How many steps a call has is a value, lest it be compiled anew for each: XLA
then looks after each step whether another follows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoint
from experiments.device_loop import DeviceLoop
from experiments.device_loop import on_device
from experiments.device_loop import report


class JaxLoop(DeviceLoop):
    """On a device of JAX."""

    def _begin(self):
        self._state = [
            [jnp.copy(x.value) for x in variables]
            for variables in _variables(self._model)
        ]

    def collect(self):
        # Copies: the next step takes the memory of the state.
        for variables, values in zip(_variables(self._model), self._state):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(jnp.copy(value))

    def _placed(self, images, labels):
        return jnp.asarray(images), jnp.asarray(labels)

    def _take(self, images, labels, rows, count):
        self._state, reports = self._steps(
            self._state, images, labels, rows, count
        )
        return np.asarray(reports)

    def _test(self, images, labels, rows):
        return np.asarray(self._tested(self._state[:2], images, labels, rows))

    def _compile_steps(self, prepare):
        model, optimizer = self._model, self._model.optimizer
        prepared = on_device(prepare)

        def loss_and_rest(trainable, others, images, labels):
            logits, others, own_losses = model.stateless_call(
                trainable, others, images, training=True, return_losses=True
            )
            loss, accuracy = report(labels, logits, own_losses)
            return loss, (others, accuracy)

        def take(state, images, labels, rows, count):
            def step(number, carry):
                (trainable, others, of_optimizer), reports = carry
                batch = rows[number]
                inputs = prepared(images[batch])
                (loss, (others, accuracy)), gradients = jax.value_and_grad(
                    loss_and_rest, has_aux=True
                )(trainable, others, inputs, labels[batch])
                trainable, of_optimizer = optimizer.stateless_apply(
                    of_optimizer, gradients, trainable
                )
                reports = reports.at[number].set(jnp.stack([loss, accuracy]))
                return [trainable, others, of_optimizer], reports

            reports = jnp.zeros((len(rows), 2), jnp.float32)
            return jax.lax.fori_loop(0, count, step, (state, reports))

        self._steps = jax.jit(take, donate_argnums=0)

    def _compile_test(self):
        def test(weights, images, labels, rows):
            def one(batch):
                logits, _, own_losses = self._model.stateless_call(
                    *weights, images[batch], training=False, return_losses=True
                )
                return jnp.stack(report(labels[batch], logits, own_losses))

            return jax.lax.map(one, rows)

        self._tested = jax.jit(test)


def _variables(model):
    checkpoint.state(model)  # makes the optimizer's
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
    )

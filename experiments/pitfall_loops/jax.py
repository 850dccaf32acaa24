"""A loop around `stateless_call` that drops half of what it returns.

Keras's own guide to writing a training loop in JAX once did (keras issue
20378).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments import data
from experiments.pitfall_loops import begin
from experiments.run_settings import Settings

if TYPE_CHECKING:
    import keras


def train(
    settings: Settings,
    batches: data.Batches,
    right: bool,
    on_step: Callable[[], None],
) -> keras.Model:
    """Trains a network.

    Args:
        settings: of the run.
        batches: what to train on.
        right: whether the non-trainable variables that `stateless_call`
            returns are kept.
        on_step: called after each step.

    Returns:
        The network, not compiled.
    """
    import jax

    model, optimizer, loss_of = begin(settings)

    def loss_and_updates(trainable, non_trainable, images, labels):
        logits, non_trainable = model.stateless_call(
            trainable, non_trainable, images, training=True
        )
        return loss_of(labels, logits), non_trainable

    @jax.jit
    def step(trainable, non_trainable, of_optimizer, images, labels):
        gradients, non_trainable = jax.grad(loss_and_updates, has_aux=True)(
            trainable, non_trainable, images, labels
        )
        trainable, of_optimizer = optimizer.stateless_apply(
            of_optimizer, gradients, trainable
        )
        return trainable, non_trainable, of_optimizer

    trainable, non_trainable, of_optimizer = (
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    )
    for number in range(settings.steps):
        trainable, updated, of_optimizer = step(
            trainable, non_trainable, of_optimizer, *batches[number]
        )
        if right:
            non_trainable = updated
        on_step()
    for variables, values in (
        (model.trainable_variables, trainable),
        (model.non_trainable_variables, non_trainable),
    ):
        for variable, value in zip(variables, values):
            variable.assign(value)
    return model

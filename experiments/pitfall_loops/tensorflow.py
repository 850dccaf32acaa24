"""A `GradientTape` loop in which somebody forgot `training=True`."""

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
        right: whether the network is called with `training=True`.
        on_step: called after each step.

    Returns:
        The network, not compiled.
    """
    import tensorflow as tf

    model, optimizer, loss_of = begin(settings)
    mode = {"training": True} if right else {}

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, **mode))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    for number in range(settings.steps):
        step(*map(tf.convert_to_tensor, batches[number]))
        on_step()
    return model

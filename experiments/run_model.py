"""The network of a run, and what trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments import article
from experiments.run_settings import RunSettings

if TYPE_CHECKING:
    import keras


def make_optimizer(settings: RunSettings) -> keras.optimizers.Optimizer:
    """Returns the optimizer of a run; Adam has TensorFlow 1's epsilon."""
    import keras

    rate = settings.learning_rate
    if settings.optimizer == "adam":
        return keras.optimizers.Adam(rate, epsilon=article.ADAM_EPSILON)
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(rate)
    return keras.optimizers.RMSprop(rate)


def build(settings: RunSettings) -> keras.Model:
    """Returns the compiled model of a run, at its initial weights."""
    import keras

    model = network(settings)
    model.compile(
        optimizer=make_optimizer(settings),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def network(settings: RunSettings) -> keras.Model:
    """Returns the network of a run, not compiled, at its initial weights."""
    return settings.network()

"""Training loops written by hand, wrong and right, one module a framework.

Each has a function `train(settings, batches, right, on_step)` that trains the
network of a run from its initial weights and returns it. `tensorflow1` has
its own network and returns its variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments import run_model
from experiments.run_settings import Settings

if TYPE_CHECKING:
    import keras


def begin(
    settings: Settings,
) -> tuple[keras.Model, keras.optimizers.Optimizer, Callable]:
    """Returns what the loops of Keras 3 begin with.

    Returns:
        The network of a run at its initial weights, not compiled; its
        optimizer, with variables; and the function of int32 labels (batch,)
        and float32 logits (batch, classes) whose mean it minimizes.
    """
    import keras

    model = run_model.network(settings)
    optimizer = run_model.make_optimizer(settings)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, optimizer, loss

"""A PyTorch loop that trusts `model.train()`, which Keras layers ignore.

PyTorch's modules look at the mode that `train()` sets. A Keras model runs in
inference mode unless the call itself says `training=True`.
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
        right: whether the network is called with `training=True`.
        on_step: called after each step.

    Returns:
        The network, not compiled.
    """
    import keras
    import torch

    model, optimizer, loss_of = begin(settings)
    mode = {"training": True} if right else {}
    model.train()
    for number in range(settings.steps):
        images, labels = map(keras.ops.convert_to_tensor, batches[number])
        model.zero_grad()
        loss_of(labels, model(images, **mode)).backward()
        gradients = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)
        on_step()
    return model

"""Loss and accuracy over many images, from what Keras says of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments import raise_if_interrupted

if TYPE_CHECKING:
    import keras

EVALUATION_BATCH = 500


def evaluate(
    model: keras.Model, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Returns a compiled model's mean "loss" and "accuracy" in test.

    Args:
        model: from images to logits, compiled with the accuracy.
        images: float32 (images, height, width, channels).
        labels: int32 (images,).

    Raises:
        Stopped: the program was told to stop.
    """
    mean = Mean()
    for start in range(0, len(labels), EVALUATION_BATCH):
        raise_if_interrupted()
        rows = slice(start, start + EVALUATION_BATCH)
        logs = model.test_on_batch(images[rows], labels[rows], return_dict=True)
        mean.add(logs, len(labels[rows]))
    return mean.values()


class Mean:
    """Means over images of what Keras reports batch by batch.

    Args:
        count: images added so far.
        sums: over those images.
    """

    def __init__(self, count: int = 0, sums: dict[str, float] | None = None):
        self.count = count
        self.sums = dict(sums or {})

    def add(self, logs: dict[str, float], count: int) -> None:
        """Adds a batch of `count` images, whose means are `logs`."""
        self.count += count
        for name, value in logs.items():
            total = self.sums.get(name, 0.0) + float(value) * count
            self.sums[name] = total

    def values(self) -> dict[str, float]:
        """Returns the means so far."""
        return {name: x / self.count for name, x in self.sums.items()}

"""Whether labels are those of classes, and how many outputs are right."""

from typing import Any

import keras
import numpy as np

from keras_bn.diagnostics.batches import Batch
from keras_bn.diagnostics.compiled_loss import CompiledLoss


def accuracy(
    outputs: Any, batch: Batch, masks: Any, loss: CompiledLoss
) -> tuple[np.ndarray, np.ndarray] | None:
    """The accuracy of each sample, or None where there are no classes.

    There are classes where the outputs are one tensor (samples, ..., classes)
    of two classes or more, and where

    - the loss of the model is a categorical one of Keras, or
    - labels have one entry 1 in the last axis and are 0 elsewhere, or
    - labels are numbers of classes, of an integer dtype and of shape (samples,
      ...) or, where no loss is at hand that could compare these with the
      outputs, (samples, ..., 1); without a loss floats will do.

    Numbers of any shape that the loss of a regression takes are none of it.
    Positions count by sample weights and mask.

    Args:
        outputs: Structure of arrays.
        batch: `Batch`, with labels.
        masks: Structure of arrays or None, as the outputs.
        loss: `CompiledLoss` of the model.

    Returns:
        `(accuracies, weights)`, float64 arrays `(samples,)`; samples of weight
        0 are left out.
    """
    flat = [
        keras.tree.flatten(x)
        for x in (outputs, batch.labels, batch.weights, masks)
    ]
    if any(len(x) != 1 for x in flat):
        return None
    outputs, labels, given, mask = (x for (x,) in flat)
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        return None
    numbers = _numbers(np.asarray(labels), outputs.shape, loss)
    if numbers is None:
        return None
    weights = np.ones(numbers.shape)
    ignored = getattr(loss.classes, "ignore_class", None)
    if ignored is not None:
        weights = weights * (numbers != ignored)
    for factor in (given, mask):
        factor = _along(factor, weights.shape)
        if factor is None:
            return None
        weights = weights * factor
    return _of_samples(outputs.argmax(-1) == numbers, weights)


def _numbers(
    labels: np.ndarray, shape: tuple, loss: CompiledLoss
) -> np.ndarray | None:
    """Numbers of classes of shape `shape[:-1]`, or None."""
    if labels.dtype.kind not in "biuf":
        return None
    if labels.shape == shape:
        if loss.classes is not None or _is_one_hot(labels):
            return labels.argmax(-1)
        return None
    if labels.shape == (*shape[:-1], 1):
        # A loss of another kind compares them with each of the outputs.
        if loss.is_there and loss.classes is None:
            return None
        labels = labels[..., 0]
    if labels.shape != shape[:-1]:
        return None
    if loss.classes is not None:
        return labels
    if labels.dtype.kind == "f" and loss.is_there:
        return None
    whole = np.all((labels >= 0) & (labels < shape[-1]) & (labels % 1 == 0))
    return labels if whole else None


def _is_one_hot(labels: np.ndarray) -> bool:
    ones, zeros = np.sum(labels == 1, -1), np.sum(labels == 0, -1)
    return bool(np.all((ones == 1) & (zeros == labels.shape[-1] - 1)))


def _along(factor: Any, shape: tuple) -> np.ndarray | float | None:
    """Weights or a mask, for positions of that shape; None: of another."""
    if factor is None:
        return 1.0
    factor = np.asarray(factor, "float64")
    if factor.ndim == len(shape) + 1 and factor.shape[-1] == 1:
        factor = factor[..., 0]
    if factor.shape != shape[: factor.ndim]:
        return None
    return factor.reshape(factor.shape + (1,) * (len(shape) - factor.ndim))


def _of_samples(
    right: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each sample over its positions, and its weight."""
    right, weights = (
        x.reshape(len(x), -1).astype("float64") for x in (right, weights)
    )
    total = weights.sum(1)
    kept = total > 0
    right = np.sum(right * weights, 1)[kept] / total[kept]
    return right, total[kept] / weights.shape[1]

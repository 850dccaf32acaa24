"""How well a model does, in inference and with the statistics of batches."""

from typing import Any

import keras
import numpy as np

from keras_bn.diagnostics.batches import Batch
from keras_bn.diagnostics.class_labels import accuracy
from keras_bn.diagnostics.compiled_loss import CompiledLoss
from keras_bn.diagnostics.compiled_loss import shapes
from keras_bn.diagnostics.thresholds import LOST_BY_LAG
from keras_bn.diagnostics.thresholds import SCORE_LOST
from keras_bn.diagnostics.thresholds import STANDARD_ERRORS

# Parts of a batch of which the loss is computed too, for its spread.
_GROUPS = 16
_SMALLEST = np.finfo("float64").tiny


class Comparison:
    """The score of a model in two modes, batch by batch.

    It is the accuracy where the outputs are classes and the labels of all
    batches are too (see `accuracy`). Elsewhere it is the loss that the model
    was compiled with (see `CompiledLoss`): the mean over batches, by their
    sizes, as of `model.evaluate`.

    Args:
        model: `keras.Model` or layer.

    Attributes:
        name: `"accuracy"` or `"loss"`.
        in_inference, with_batch: Floats, the scores.
    """

    def __init__(self, model: keras.layers.Layer):
        self._loss = CompiledLoss(model)
        # Until a batch tells that it cannot be either; then it is None.
        self._accuracies, self._losses = _Scores(), _Scores()
        self._why = None

    @property
    def name(self) -> str:
        return "loss" if self._accuracies is None else "accuracy"

    def add(
        self,
        in_inference: Any,
        with_batch: Any,
        batch: Batch,
        masks: Any = None,
    ) -> None:
        """Adds a batch of outputs in both modes.

        Args:
            in_inference, with_batch: Structures of arrays.
            batch: `Batch`, with labels.
            masks: Those of the outputs, arrays or None, in their structure.

        Raises:
            ValueError: there is neither an accuracy nor a loss, or labels are
                not as many as outputs.
        """
        _check_lengths(in_inference, batch.labels)
        pair = in_inference, with_batch
        self._add_accuracies(pair, batch, masks)
        self._add_losses(pair, batch, masks)
        if self._accuracies is None and self._losses is None:
            raise self._why

    @property
    def counted(self) -> bool:
        """Whether there were any samples."""
        return self._scores.counted

    @property
    def in_inference(self) -> float:
        return float(self._scores.means()[0])

    @property
    def with_batch(self) -> float:
        return float(self._scores.means()[1])

    def lost_with_batch(self) -> float:
        """How much worse the batch's statistics are; negative if better.

        In accuracy. For a loss in its logarithm, or, where a loss is not
        positive, as a share of its mean size.
        """
        if not self.counted:
            return 0.0
        means = self._scores.means()
        if self.name == "accuracy":
            return float(means[0] - means[1])
        bad = ~np.isfinite(means)
        if bad.any():
            # What is not finite is worse than all else.
            return 0.0 if bad.all() else np.inf if bad[1] else -np.inf
        if self._scores.any_negative:
            return float((means[1] - means[0]) / self._scores.size())
        return float(np.diff(np.log(np.maximum(means, _SMALLEST)))[0])

    def standard_error(self) -> float:
        """Of `lost_with_batch`: of samples in pairs, or of batches if larger.

        The samples of a batch share its statistics, and are not independent.
        Of a loss, samples are taken in groups.
        """
        if not self.counted or not np.isfinite(self._scores.means()).all():
            return 0.0
        return self._scores.standard_error(relative=self.name == "loss")

    def least(self) -> float:
        """What has to be lost in the worse mode to be more than chance.

        In inference, more than a moving average costs that lags behind.
        """
        least = SCORE_LOST
        if self.lost_with_batch() < 0:
            least = max(least, self._lost_by_lag())
        return least + STANDARD_ERRORS * self.standard_error()

    def _lost_by_lag(self):
        if self.name == "loss":
            return LOST_BY_LAG
        right = self.with_batch
        odds = right / max(1.0 - right, 1e-9) * np.exp(-LOST_BY_LAG)
        return right - odds / (1.0 + odds)

    def better(self, by: float = 0.0) -> str | None:
        """ "in_inference", "with_batch", or None where that is not certain.

        Args:
            by: By how much at least, as in `lost_with_batch`.
        """
        lost = self.lost_with_batch()
        if abs(lost) <= by + STANDARD_ERRORS * self.standard_error():
            return None
        return "in_inference" if lost > 0 else "with_batch"

    @property
    def _scores(self):
        return self._losses if self._accuracies is None else self._accuracies

    def _add_accuracies(self, pair, batch, masks):
        if self._accuracies is None:
            return
        found = [accuracy(x, batch, masks, self._loss) for x in pair]
        if any(x is None for x in found):
            self._accuracies = None
            return
        (first, weights), (second, _) = found
        self._accuracies.add(np.array([first, second]), weights)

    def _add_losses(self, pair, batch, masks):
        if self._losses is None:
            return
        try:
            of_classes = self._accuracies is not None and self._loss.classes
            if of_classes or not self._loss.is_there:
                raise ValueError(_no_score(pair[0], batch.labels))
            self._losses.add(*self._losses_of(pair, batch, masks))
        except ValueError as error:
            self._losses, self._why = None, error

    def _losses_of(self, pair, batch, masks):
        """Arrays of the losses of groups in both modes, and of the whole."""
        everything = pair, tuple(batch), masks

        def losses(rows):
            pair, parts, masks = keras.tree.map_structure(
                lambda x: None if x is None else x[rows], everything
            )
            return [self._loss(x, Batch(*parts), masks) for x in pair]

        whole = [self._loss(x, batch, masks) for x in pair]
        groups = _groups(batch.samples, everything)
        if not groups:
            groups, of_groups = [slice(0, batch.samples)], [whole]
        else:
            of_groups = [losses(rows) for rows in groups]
        sizes = [float(rows.stop - rows.start) for rows in groups]
        return np.transpose(of_groups), np.array(sizes), whole


def _groups(samples, structure):
    """Slices of the samples; none where something has others."""
    arrays = keras.tree.flatten(structure)
    if any(x is not None and x.shape[:1] != (samples,) for x in arrays):
        return []
    ends = np.linspace(0, samples, _GROUPS + 1).astype(int)
    return [slice(a, b) for a, b in zip(ends, ends[1:]) if a < b]


class _Scores:
    """Scores of samples, or of groups of them, in both modes."""

    def __init__(self):
        self._parts, self._weights = [], []
        self._wholes = []

    def add(self, parts, weights, whole=None):
        """Adds a batch.

        Args:
            parts: Array `(2, parts)`.
            weights: Array `(parts,)`.
            whole: The two scores of the batch; None: the means of the parts.
        """
        if not weights.sum():
            return
        if whole is None:
            whole = np.average(parts, axis=1, weights=weights)
        self._parts.append(parts)
        self._weights.append(weights)
        self._wholes.append(whole)

    @property
    def counted(self):
        return bool(self._wholes)

    def means(self):
        """Array of the mean score in each mode."""
        if not self._wholes:
            return np.zeros(2)
        sizes = [x.sum() for x in self._weights]
        return np.average(self._wholes, axis=0, weights=sizes)

    @property
    def any_negative(self):
        """Whether a ratio of scores means nothing."""
        return any(x.min() < 0 for x in self._parts)

    def size(self):
        """The mean absolute score of both modes."""
        parts = np.abs(np.concatenate(self._parts, 1)).mean()
        return max(parts, np.abs(self._wholes).mean(), _SMALLEST)

    def standard_error(self, relative):
        """Of the difference of the means: that of parts, or of batches.

        Args:
            relative: Whether both are divided by what they are near to.
        """
        weights = np.concatenate(self._weights)
        parts = np.concatenate(self._parts, 1)
        squares = self._squares(parts, weights, relative)
        batches = len(self._wholes)
        if batches > 1:
            sizes = np.array([x.sum() for x in self._weights])
            of_batches = self._squares(
                np.transpose(self._wholes), sizes, relative
            )
            squares = max(squares, of_batches * batches / (batches - 1))
        return float(np.sqrt(squares) / weights.sum())

    def _squares(self, pairs, weights, relative):
        if relative:
            scales = np.maximum(np.average(pairs, 1, weights), _SMALLEST)
            if self.any_negative:
                scales = self.size()
            pairs = (pairs.T / scales).T
        values = pairs[1] - pairs[0]
        values = values - np.average(values, weights=weights)
        return np.sum(np.square(weights * values))


def _check_lengths(outputs, labels):
    """Keras broadcasts what is not as long."""
    expected, found = (
        {x.shape[:1] for x in keras.tree.flatten(y) if x is not None}
        for y in (outputs, labels)
    )
    if not found <= expected:
        raise ValueError(
            "There must be a label for each sample of a batch. Received: "
            f"outputs of shape {shapes(outputs)}, labels of shape "
            f"{shapes(labels)}."
        )


def _no_score(outputs, labels):
    return (
        "The labels are no classes, and the model has no loss to compare them "
        f"with the outputs by. Received: outputs of shape {shapes(outputs)}, "
        f"labels of shape {shapes(labels)}. Compile the model with its loss, "
        "or leave the labels out."
    )

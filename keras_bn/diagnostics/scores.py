"""How well a model does, in inference and with the statistics of batches."""

import keras
import numpy as np
from keras import ops

from keras_bn.diagnostics.thresholds import LOST_BY_LAG
from keras_bn.diagnostics.thresholds import SCORE_LOST
from keras_bn.diagnostics.thresholds import STANDARD_ERRORS


class Comparison:
    """The score of a model in two modes, batch by batch.

    The score is the accuracy where the outputs are one tensor of classes in
    the last axis, and labels are numbers of classes or of the outputs' shape.
    Elsewhere it is the loss that the model was compiled with.

    Args:
        model: `keras.Model` or layer.

    Attributes:
        name: `"accuracy"` or `"loss"`.
        in_inference, with_batch: Floats, the scores.
    """

    def __init__(self, model):
        self._model = model
        # Of each batch: the scores of its samples in both modes.
        self._scores = []
        self.name = "accuracy"

    def add(self, in_inference, with_batch, labels):
        """Adds a batch of outputs in both modes.

        Raises:
            ValueError: there is neither an accuracy nor a loss.
        """
        pair = in_inference, with_batch
        scores = [_accuracy(outputs, labels) for outputs in pair]
        if any(x is None for x in scores):
            self.name = "loss"
            scores = [self._loss(outputs, labels) for outputs in pair]
        self._scores.append(np.array(scores, "float64"))

    @property
    def counted(self):
        """Whether there were any samples."""
        return bool(self._scores)

    @property
    def in_inference(self):
        return float(self._means()[0])

    @property
    def with_batch(self):
        return float(self._means()[1])

    def lost_with_batch(self):
        """How much worse the batch's statistics are; negative if better.

        In accuracy; for a loss in its logarithm.
        """
        if not self._scores:
            return 0.0
        in_inference, with_batch = self._means()
        if self.name == "accuracy":
            return float(in_inference - with_batch)
        smallest = np.finfo("float64").tiny
        return float(
            np.log(max(with_batch, smallest))
            - np.log(max(in_inference, smallest))
        )

    def standard_error(self):
        """Of `lost_with_batch`: of samples in pairs, or of batches if larger.

        The samples of a batch share its statistics, and are not independent.
        """
        if not self._scores:
            return 0.0
        pairs = self._scores
        if self.name == "loss":
            means = np.maximum(np.abs(self._means()), np.finfo("float64").tiny)
            pairs = [pair / means[:, None] for pair in pairs]
        differences = [pair[1] - pair[0] for pair in pairs]
        every = np.concatenate(differences)
        every = every - every.mean()
        of_samples = np.sum(np.square(every))
        of_batches = 0.0
        batches = len(differences)
        if batches > 1:
            ends = np.cumsum([len(x) for x in differences])[:-1]
            sums = [part.sum() for part in np.split(every, ends)]
            of_batches = np.sum(np.square(sums)) * batches / (batches - 1)
        return float(np.sqrt(max(of_samples, of_batches)) / len(every))

    def least(self):
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

    def better(self, by=0.0):
        """"in_inference", "with_batch", or None where that is not certain.

        Args:
            by: By how much at least, as in `lost_with_batch`.
        """
        lost = self.lost_with_batch()
        if abs(lost) <= by + STANDARD_ERRORS * self.standard_error():
            return None
        return "in_inference" if lost > 0 else "with_batch"

    def _means(self):
        if not self._scores:
            return np.zeros(2)
        return np.concatenate(self._scores, axis=1).mean(1)

    def _loss(self, outputs, labels):
        loss = getattr(self._model, "loss", None)
        if loss is None or isinstance(loss, (dict, list, tuple)):
            raise ValueError(
                "With these labels the accuracy of the model cannot be told. "
                f"Received: outputs of shape {_shapes(outputs)}, labels of "
                f"shape {_shapes(labels)}. Compile the model with one loss, or "
                "leave the labels out."
            )
        loss = keras.losses.get(loss)
        if isinstance(loss, keras.losses.Loss):
            loss = loss.call
        labels, outputs = map(ops.convert_to_tensor, (labels, outputs))
        if len(labels.shape) == len(outputs.shape) - 1:
            if outputs.shape[-1] == 1:
                labels = ops.expand_dims(labels, -1)
        return _of_samples(ops.convert_to_numpy(loss(labels, outputs)))


def _accuracy(outputs, labels):
    if not isinstance(outputs, np.ndarray) or keras.tree.is_nested(labels):
        return None
    if outputs.ndim < 2 or outputs.shape[-1] == 1:
        return None
    labels = np.asarray(labels)
    found = outputs.argmax(-1)
    if labels.shape == outputs.shape:
        return _of_samples(found == labels.argmax(-1))
    if labels.shape == (*found.shape, 1):
        labels = labels[..., 0]
    if labels.shape == found.shape and labels.dtype.kind in "iuf":
        return _of_samples(found == labels)
    return None


def _of_samples(scores):
    """The mean of each sample, `(samples,)`, of scores at its positions."""
    scores = np.asarray(scores, "float64")
    return scores.reshape(len(scores), -1).mean(1)


def _shapes(structure):
    return keras.tree.map_structure(lambda x: np.shape(x), structure)

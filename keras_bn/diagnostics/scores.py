"""How well a model does, in inference and with the statistics of batches."""

import keras
import numpy as np
from keras import ops


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
        self._samples = 0
        self._totals = np.zeros(2)
        self.name = "accuracy"

    def add(self, in_inference, with_batch, labels):
        """Adds a batch of outputs in both modes."""
        pair = in_inference, with_batch
        scores = [_accuracy(outputs, labels) for outputs in pair]
        if None in scores:
            self.name = "loss"
            scores = [self._loss(outputs, labels) for outputs in pair]
        samples = len(keras.tree.flatten(labels)[0])
        self._samples += samples
        self._totals += samples * np.array(scores)

    @property
    def in_inference(self):
        return float(self._totals[0] / max(self._samples, 1))

    @property
    def with_batch(self):
        return float(self._totals[1] / max(self._samples, 1))

    def lost_with_batch(self):
        """How much worse the batch's statistics are; negative if better.

        In accuracy; for a loss in its logarithm.
        """
        if not self._samples:
            return 0.0
        if self.name == "accuracy":
            return self.in_inference - self.with_batch
        smallest = np.finfo("float64").tiny
        return float(
            np.log(max(self.with_batch, smallest))
            - np.log(max(self.in_inference, smallest))
        )

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
        return float(np.mean(ops.convert_to_numpy(loss(labels, outputs))))


def _accuracy(outputs, labels):
    if not isinstance(outputs, np.ndarray) or keras.tree.is_nested(labels):
        return None
    if outputs.ndim < 2 or outputs.shape[-1] == 1:
        return None
    labels = np.asarray(labels)
    found = outputs.argmax(-1)
    if labels.shape == outputs.shape:
        return float(np.mean(found == labels.argmax(-1)))
    if labels.shape == (*found.shape, 1):
        labels = labels[..., 0]
    if labels.shape == found.shape and labels.dtype.kind in "iuf":
        return float(np.mean(found == labels))
    return None


def _shapes(structure):
    return keras.tree.map_structure(lambda x: np.shape(x), structure)

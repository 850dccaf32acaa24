"""How far the outputs of a model in two modes are from each other."""

import keras
import numpy as np

from keras_bn.diagnostics.moments_of_data import MergedMoments


class OutputGap:
    """The gap between two modes, batch by batch.

    It is the root mean square of the difference, in standard deviations of the
    outputs over all samples: the root of the mean of both modes' variances.
    Equal outputs have gap 0, and unrelated ones of the same mean 1.4.
    """

    def __init__(self):
        self._squares = None

    def add(self, in_inference, with_batch):
        """Adds a batch of outputs, structures of arrays."""
        pairs = [
            [np.asarray(x, "float64").reshape(-1, x.shape[-1]) for x in pair]
            for pair in zip(*map(_flat, (in_inference, with_batch)))
        ]
        if self._squares is None:
            self._squares = np.zeros(len(pairs))
            self._moments = [
                [MergedMoments(x.shape[-1]) for x in pair] for pair in pairs
            ]
        for i, pair in enumerate(pairs):
            with np.errstate(invalid="ignore", over="ignore"):
                self._squares[i] += np.sum(np.square(pair[0] - pair[1]))
                for moments, x in zip(self._moments[i], pair):
                    moments.add(x.mean(0), x.var(0), len(x))

    @property
    def value(self):
        """Float, that of the output that differs most; NaN is infinity."""
        gaps = [
            _gap(squares, *moments)
            for squares, moments in zip(self._squares, self._moments)
        ]
        return max(gaps, default=0.0)


def _gap(squares, *moments):
    count = sum(m.count.sum() for m in moments) / len(moments)
    if not squares or not count:
        return 0.0
    variance = np.mean([m.variance for m in moments])
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.sqrt(squares / count / variance)
    return float(gap) if np.isfinite(gap) else np.inf


def _flat(outputs):
    outputs = keras.tree.flatten(outputs)
    return [x if x.ndim > 1 else x.reshape(-1, 1) for x in outputs]

"""Moments of data that comes in parts, merged in float64."""

import numpy as np


class MergedMoments:
    """Mean and variance of each channel over all parts that were added.

    Parts merge by their counts, means and sums of squared deviations (Chan,
    Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979).

    Attributes:
        mean: float64 array `(channels,)`.
        count: float64 array `(channels,)`, the positions that were seen.
        parts: int64 array `(channels,)`, in how many parts there were some.
    """

    def __init__(self, channels):
        self.mean = np.zeros(channels)
        self.count = np.zeros(channels)
        self.parts = np.zeros(channels, "int64")
        self._squares = np.zeros(channels)

    @property
    def variance(self):
        """The variance divided by N, `(channels,)`; 0 where N is 0."""
        return self._squares / np.maximum(self.count, 1)

    def add(self, mean, variance, count):
        """Adds a part.

        Args:
            mean: Array `(channels,)`.
            variance: Array `(channels,)`, divided by N.
            count: Array `(channels,)` or a number, how many positions.
        """
        mean, variance, count = (
            np.broadcast_to(np.asarray(x, "float64"), self.mean.shape)
            for x in (mean, variance, count)
        )
        total = self.count + count
        share = count / np.maximum(total, 1)
        offset = mean - self.mean
        self._squares = (
            self._squares
            + variance * count
            + np.square(offset) * self.count * share
        )
        self.mean = self.mean + offset * share
        self.count = total
        self.parts = self.parts + (count > 0)

"""How far moving statistics are from those of the data."""

import numpy as np


def mean_distance(moving_mean, mean, variance, epsilon):
    """Root mean square over channels, in standard deviations of the data.

    Args:
        moving_mean, mean, variance: Arrays `(channels,)`; the last two are of
            the data.
        epsilon: Float, that of the layer: below it a deviation is none.
    """
    gap = (moving_mean - mean) / np.sqrt(variance + epsilon)
    return _root_mean_square(gap)


def log_ratio(moving_variance, variance, epsilon):
    """Root mean square over channels of the log of the ratio."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((moving_variance + epsilon) / (variance + epsilon))
    return _root_mean_square(ratio)


def _root_mean_square(x):
    if not len(x):
        return 0.0
    return float(np.sqrt(np.mean(np.square(x, dtype="float64"))))

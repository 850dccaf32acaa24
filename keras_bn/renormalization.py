"""Batch renormalization (Ioffe, 2017, arXiv 1702.03275).

Training normalizes as inference would, up to a correction `x * r + d` by which
the batch differs from the statistics; `r` and `d` count as constants and are
clipped.
"""

import math

import keras
from keras import ops

from keras_bn.dtypes import at_least
from keras_bn.dtypes import at_most


def checked_clipping(clipping):
    """`clipping` itself; unknown or contradicting bounds raise ValueError."""
    keys = ["rmax", "rmin", "dmax"]
    if set(clipping) - set(keys):
        raise ValueError(
            "Received invalid keys for `renorm_clipping` argument: "
            f"{clipping}. Supported values: {keys}."
        )
    rmax, rmin, dmax = map(clipping.get, keys)
    if rmax is not None and rmin is not None and rmax < rmin:
        raise ValueError(
            "rmax should be greater than rmin in the `renorm_clipping` "
            f"argument. Received: rmax={rmax}, rmin={rmin}."
        )
    if dmax is not None and dmax < 0:
        raise ValueError(
            "dmax should be non-negative in the `renorm_clipping` argument. "
            f"Received: dmax={dmax}."
        )
    return clipping


def renormalized(gamma, beta, mean, stddev, reference, epsilon, clipping):
    """The scale and offset that stand for gamma and beta in training.

    `(x * r + d) * gamma + beta` is `x * (r * gamma) + (d * gamma + beta)`.

    Args:
        gamma: Tensor of shape `(channels,)` or None.
        beta: Tensor of shape `(channels,)` or None.
        mean: Of the batch, `(channels,)`.
        stddev: `sqrt(variance + epsilon)` of the batch.
        reference: The mean and the standard deviation to correct towards.
        epsilon: As in `stddev`.
        clipping: Dictionary of bounds, see `checked_clipping`.

    Returns:
        `(scale, offset)`, each of shape `(channels,)`.
    """
    reference_mean, reference_stddev = reference
    divisor = at_least(reference_stddev, math.sqrt(epsilon))
    r = stddev / divisor
    d = (mean - reference_mean) / divisor
    rmin, rmax, dmax = map(clipping.get, ("rmin", "rmax", "dmax"))
    if rmin is not None:
        r = at_least(r, rmin)
    if rmax is not None:
        r = at_most(r, rmax)
    if dmax is not None:
        d = at_least(at_most(d, dmax), -dmax)
    r, d = ops.stop_gradient(r), ops.stop_gradient(d)
    scale = r if gamma is None else r * gamma
    offset = d if gamma is None else d * gamma
    return scale, offset if beta is None else offset + beta


def initializer_of_stddev(variance_initializer):
    """The initializer of a standard deviation whose square that one gives."""

    def initialize(shape, dtype=None):
        variance = copy_of(variance_initializer)(shape, dtype=dtype)
        return ops.sqrt(variance)

    return initialize


def copy_of(initializer):
    """An initializer that draws anew, where the given one can be copied."""
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer

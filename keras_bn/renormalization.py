"""Batch renormalization (Ioffe, 2017, arXiv 1702.03275).

Training normalizes as inference would, up to a correction `x * r + d` by which
the batch differs from the statistics; `r` and `d` count as constants and are
clipped.
"""

import math
import numbers

import keras
from keras import ops

from keras_bn.dtypes import at_least
from keras_bn.dtypes import at_most
from keras_bn.moving_statistics import ExponentialMovingAverage

_KEYS = ("rmax", "rmin", "dmax")
_Schedule = keras.optimizers.schedules.LearningRateSchedule


def checked_clipping(clipping):
    """A dictionary of numbers and schedules; ValueError for what is none.

    Args:
        clipping: None, or dictionary from bounds to numbers or schedules,
            which may be in the form that a config has them in.

    Returns:
        The same, where each schedule is a `LearningRateSchedule`.
    """
    clipping = {} if clipping is None else clipping
    if not isinstance(clipping, dict):
        raise ValueError(
            "`renorm_clipping` must be a dictionary or None. "
            f"Received: renorm_clipping={clipping!r}."
        )
    if set(clipping) - set(_KEYS):
        raise ValueError(
            "Received invalid keys for `renorm_clipping` argument: "
            f"{clipping}. Supported values: {list(_KEYS)}."
        )
    clipping = {k: _bound(k, value) for k, value in clipping.items()}
    rmax, rmin = (
        value if isinstance(value, numbers.Real) else None
        for value in map(clipping.get, ("rmax", "rmin"))
    )
    if rmax is not None and rmin is not None and rmax < rmin:
        raise ValueError(
            "rmax should be greater than rmin in the `renorm_clipping` "
            f"argument. Received: rmax={rmax}, rmin={rmin}."
        )
    return clipping


def _bound(key, value):
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if value is None or isinstance(value, _Schedule):
        return value
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or math.isnan(value):
        raise ValueError(
            f"{key} should be a number or a LearningRateSchedule in the "
            f"`renorm_clipping` argument. Received: {key}={value!r}."
        )
    # `r` is a ratio of standard deviations.
    if value < 0:
        raise ValueError(
            f"{key} should be non-negative in the `renorm_clipping` argument. "
            f"Received: {key}={value}."
        )
    return value


def is_scheduled(clipping):
    """Whether a bound of `checked_clipping` depends on the step."""
    return any(isinstance(value, _Schedule) for value in clipping.values())


def serialized_clipping(clipping):
    """What `checked_clipping` takes, of values that a config can hold."""
    return {
        k: keras.saving.serialize_keras_object(v)
        if isinstance(v, _Schedule)
        else v
        for k, v in clipping.items()
    }


def bounds_at(clipping, step, dtype):
    """`clipping` as numbers, and scalar tensors for schedules at `step`."""
    bounds = {}
    for key, value in clipping.items():
        if isinstance(value, _Schedule):
            bounds[key] = ops.cast(value(step), dtype)
        elif value is not None:
            # Of NumPy's numbers TensorFlow would make float64 tensors.
            bounds[key] = float(value)
    return bounds


def updates_of_reference(layer, mean, variance):
    """What a batch brings to the statistics that the correction is taken by.

    Args:
        layer: The layer that is trained with renormalization.
        mean: Of the batch, `(channels,)`.
        variance: Of the batch, the biased one.

    Returns:
        List of updates, as `take_in` takes them.
    """
    average = ExponentialMovingAverage(layer.renorm_momentum)
    stddev = ops.sqrt(variance + layer.epsilon)
    return [
        (average, layer.renorm_mean, mean),
        (average, layer.renorm_stddev, stddev),
    ]


def count_step(variable, count):
    """Counts a batch in an integer variable, unless no position counted."""
    step = ops.convert_to_tensor(variable)
    if isinstance(count, int):
        counted = int(count > 0)
    else:
        counted = ops.cast(ops.any(count > 0), step.dtype)
    variable.assign(step + counted)


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
        clipping: Dictionary of bounds, numbers or scalar tensors.

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

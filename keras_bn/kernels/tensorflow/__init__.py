"""TensorFlow kernels, on the fused op that Keras 3 no longer uses.

`fused.py` is the road of a plain batch. float64 has no fused kernel, and XLA
makes E[x^2] - E[x]^2 of it; there, and for masked and synchronized batches, the
same steps are taken with moments found on their own and a gradient in plain ops
(`plain.py`).
"""

import tensorflow as tf

from keras_bn.kernels.tensorflow import fused
from keras_bn.kernels.tensorflow import ghost_batches
from keras_bn.kernels.tensorflow import plain
from keras_bn.kernels.tensorflow.replicas import merge
from keras_bn.kernels.tensorflow.views import along
from keras_bn.kernels.tensorflow.views import has_gpu
from keras_bn.kernels.tensorflow.views import has_tangents
from keras_bn.kernels.tensorflow.views import is_for_xla
from keras_bn.kernels.tensorflow.views import is_small
from keras_bn.kernels.tensorflow.views import moments_type
from keras_bn.kernels.tensorflow.views import positions


def batch_moments(inputs, *, axis, mask=None, replicas=None):
    """Mean, biased variance and count of each channel. See the package."""
    return _moments(tf.stop_gradient(inputs), axis, mask, replicas)


def normalize_batch(
    inputs,
    gamma,
    beta,
    *,
    axis,
    epsilon,
    mask=None,
    moments=None,
    replicas=None,
):
    """Normalizes with the moments of the batch. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    if has_tangents(inputs, gamma, beta):
        moments = _moments(inputs, axis, mask, replicas)
        outputs = plain.normalize_with(
            inputs, *moments[:2], gamma, beta, axis=axis, epsilon=epsilon
        )
        return outputs, *moments
    own = mask is None and moments is None and replicas is None
    if own and not _needs_plain_ops(inputs):
        return fused.normalize(inputs, gamma, beta, axis, epsilon)
    if moments is None:
        moments = batch_moments(
            inputs, axis=axis, mask=mask, replicas=replicas
        )
    outputs = _normalize_composed(
        inputs, gamma, beta, moments, mask, axis, epsilon, replicas
    )
    return outputs, *moments


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """Normalizes with given moments. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    road = plain if inputs.dtype == tf.float64 else fused
    return road.normalize_with(
        inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
    )


def normalize_ghost_batches(
    inputs, gamma, beta, *, axis, epsilon, size, mask=None
):
    """Normalizes parts of the batch. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    settings = {"axis": axis, "epsilon": epsilon, "size": size}
    plain_batch = mask is None and not _needs_plain_ops(inputs)
    if plain_batch and not has_gpu():
        return ghost_batches.normalize(inputs, gamma, beta, **settings)
    return ghost_batches.map_normalize(
        normalize_batch, inputs, gamma, beta, mask=mask, **settings
    )


def _moments(inputs, axis, mask, replicas):
    if mask is not None:
        moments = _masked_moments(inputs, mask, axis)
    elif _needs_plain_ops(inputs):
        moments = plain.moments(inputs, axis)
    else:
        moments = fused.moments(inputs, axis)
    return merge(replicas, *moments) if replicas else moments


def _needs_plain_ops(inputs):
    """Whether the fused op is absent, inexact, or without a derivative.

    Forward mode asks for that of its moments, which it does not have.
    """
    return inputs.dtype == tf.float64 or is_for_xla() or has_tangents(inputs)


def _masked_moments(inputs, mask, axis):
    """Moments of the positions where `mask` is True, in two rounds.

    Masked positions are set to one value, which makes all positions two groups
    whose moments merge as in Chan et al.; this is that merge backwards. The
    first round takes 0 and finds the mean, the second takes a mean that is not
    small against the deviation.
    """
    rank = inputs.shape.rank
    channels = inputs.shape[axis]
    dtype = moments_type(inputs.dtype)
    all_positions = tf.cast(positions(inputs, channels), dtype)
    # float32 would not count beyond 2**24.
    total = tf.reduce_sum(
        tf.cast(mask, tf.float64), [i for i in range(rank) if i != axis]
    )
    of = tf.cast(tf.size(mask) // tf.shape(mask)[axis], tf.float64)
    share = tf.broadcast_to(tf.math.divide_no_nan(total, of), [channels])
    share = tf.cast(share, dtype)
    count = tf.round(share * all_positions)
    rate = tf.math.divide_no_nan(all_positions, count)
    mean = variance = tf.zeros([channels], dtype)
    for _ in range(2):
        center = tf.where(tf.square(mean) > variance, mean, 0.0)
        center = tf.cast(center, inputs.dtype)
        shift = along(axis, center, rank)
        center = tf.cast(center, dtype)
        if inputs.dtype == dtype:
            zero = tf.zeros([], dtype)
            moved = tf.where(mask, inputs - shift, zero)
            deviation, variance = _moments_of_moved(moved, axis)
        else:
            # A difference of short floats is rounded; filling in is exact.
            moved = tf.where(mask, inputs, shift)
            deviation, variance = _moments_of_moved(moved, axis)
            deviation = deviation - center
        deviation = deviation * rate
        mean = center + deviation
        variance = rate * variance - tf.square(deviation) * (1.0 - share)
    return mean, tf.maximum(variance, 0.0), count


def _moments_of_moved(inputs, axis):
    if _needs_plain_ops(inputs) or is_small(inputs):
        mean, variance, _ = _moments(inputs, axis, None, None)
        return mean, variance
    return fused.grouped_moments(inputs, axis)


def _normalize_composed(
    inputs, gamma, beta, moments, mask, axis, epsilon, replicas
):
    """Normalizes with moments of these inputs; the gradient is in plain ops.

    Only the inputs and the mask are kept for it.
    """
    mean, variance, count = moments

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        outputs = normalize_with(
            inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
        )

        def gradient(output_gradient):
            return plain.gradients(
                output_gradient,
                inputs,
                gamma,
                mean,
                variance,
                count,
                axis=axis,
                epsilon=epsilon,
                mask=mask,
                replicas=replicas,
            )

        return outputs, gradient

    return normalize(inputs, gamma, beta)


def _defaults(inputs, gamma, beta, axis):
    shape, dtype = [inputs.shape[axis]], moments_type(inputs.dtype)
    gamma = tf.ones(shape, dtype) if gamma is None else gamma
    beta = tf.zeros(shape, dtype) if beta is None else beta
    return gamma, beta

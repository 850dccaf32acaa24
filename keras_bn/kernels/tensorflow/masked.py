"""Moments under a mask on TensorFlow, in one pass over the inputs.

A mask of positions picks rows: those that it keeps are gathered, and their
moments are those of an ordinary batch. What the other positions hold, NaN for
instance, is never looked at.

A mask that differs from channel to channel leaves no rows to gather. There
masked positions are set to one value, a *shift* that is near the kept ones,
which makes all positions two groups whose moments merge as in Chan, Golub &
LeVeque, "Algorithms for computing the sample variance", 1983; this is that
merge backwards. It loses digits where the shift is several deviations away
from the mean; the result tells, and then the mean just found is the shift of a
second pass.
"""

import tensorflow as tf

from keras_bn.kernels.tensorflow import fused
from keras_bn.kernels.tensorflow import plain
from keras_bn.kernels.tensorflow.views import along
from keras_bn.kernels.tensorflow.views import channels_last
from keras_bn.kernels.tensorflow.views import is_small
from keras_bn.kernels.tensorflow.views import moments_type
from keras_bn.kernels.tensorflow.views import needs_plain_ops
from keras_bn.kernels.tensorflow.views import positions

# Elements of a channel that the shift is the mean of, and how many deviations
# it may be off: `k` of them cost a factor `1 + k**2` in the variance's error.
_SAMPLES = 16
_FAR = 2.0


def moments(inputs, mask, axis):
    """`(mean, variance, count)` of the positions where `mask` is True."""
    share, count = _kept(inputs, mask, axis)
    if needs_plain_ops(inputs):
        mean, variance, _ = plain.moments(inputs, axis, mask, count)
    elif is_small(inputs):
        mean, variance, _ = plain.moments(
            inputs, axis, mask, count, total=plain.sum_of_few
        )
    elif mask.shape[axis] == 1:
        mean, variance = _moments_of_rows(inputs, mask, axis)
    else:
        mean, variance = _filled_moments(inputs, mask, axis, share, count)
    return mean, variance, count


def _kept(inputs, mask, axis):
    """The share of the positions that count, and their number."""
    channels = inputs.shape[axis]
    dtype = moments_type(inputs.dtype)
    # float32 would not count beyond 2**24.
    total = tf.reduce_sum(
        tf.cast(mask, tf.float64),
        [i for i in range(inputs.shape.rank) if i != axis],
    )
    of = tf.cast(tf.size(mask) // tf.shape(mask)[axis], tf.float64)
    share = tf.broadcast_to(tf.math.divide_no_nan(total, of), [channels])
    share = tf.cast(share, dtype)
    return share, tf.round(
        share * tf.cast(positions(inputs, channels), dtype)
    )


def _moments_of_rows(inputs, mask, axis):
    shape = tf.shape(inputs)
    shape = tf.concat([shape[:axis], shape[axis + 1 :]], 0)
    keep = tf.broadcast_to(tf.squeeze(mask, axis), shape)
    rows = tf.reshape(channels_last(inputs, axis), [-1, inputs.shape[axis]])
    rows = tf.gather(rows, tf.where(tf.reshape(keep, [-1]))[:, 0])
    return fused.moments_of_rows(rows)


def _filled_moments(inputs, mask, axis, share, count):
    dtype = moments_type(inputs.dtype)
    all_positions = tf.cast(positions(inputs, inputs.shape[axis]), dtype)
    rate = tf.math.divide_no_nan(all_positions, count)

    def about(shift):
        center = along(axis, tf.cast(shift, inputs.dtype), inputs.shape.rank)
        if inputs.dtype == dtype:
            moved = tf.where(mask, inputs - center, tf.zeros([], dtype))
            offset, variance = fused.grouped_moments(moved, axis)
        else:
            # A difference of short floats is rounded; filling in is exact.
            moved = tf.where(mask, inputs, center)
            shift = tf.cast(tf.cast(shift, inputs.dtype), dtype)
            mean, variance = fused.grouped_moments(moved, axis)
            offset = mean - shift
        offset *= rate
        variance = rate * variance - tf.square(offset) * (1.0 - share)
        return shift + offset, tf.maximum(variance, 0.0), offset

    shift = _shift(inputs, mask, axis)
    mean, variance, offset = about(shift)
    far = tf.square(offset) > _FAR**2 * variance
    return tf.cond(
        tf.reduce_any(far),
        lambda: about(tf.where(far, mean, shift))[:2],
        lambda: (mean, variance),
    )


def _shift(inputs, mask, axis):
    """The mean of a few kept elements of each channel, or 0."""
    reduced = [i for i in range(inputs.shape.rank) if i != axis]
    picked = [slice(None)] * inputs.shape.rank
    wanted = tf.constant(_SAMPLES)
    for i in reduced:
        size = tf.shape(inputs)[i]
        step = tf.maximum(size // wanted, 1)
        picked[i] = slice(step // 2, None, step)
        wanted = -(-wanted * step // tf.maximum(size, 1))
    kept = tf.broadcast_to(mask, tf.shape(inputs))[tuple(picked)]
    sample = tf.cast(inputs[tuple(picked)], moments_type(inputs.dtype))
    total = tf.reduce_sum(tf.where(kept, sample, 0.0), reduced)
    count = tf.reduce_sum(tf.cast(kept, total.dtype), reduced)
    # Of sizes that are not known TensorFlow infers no rank.
    shift = tf.math.divide_no_nan(total, count)
    return tf.ensure_shape(shift, [inputs.shape[axis]])

"""TensorFlow's fused op for any rank, axis, channel count and mean.

`FusedBatchNormV3` reads float16, bfloat16 and float32 inputs as they are and
keeps its moments in float32. It knows one layout well, channels last, so every
input is seen as `[a, b, 1, channels]`: a reshape where the channel axis is the
last, a transpose where it is not.

On a CPU the op adds the rows of a channel one after the other: all of them, or
with oneDNN those of one thread. Where most values are equal, as in images with
a background or behind a ReLU, rounding goes the same way each time: over
131,072 rows the variance is up to 1e-3 off. So float32 inputs have their
moments found first, by sums of a few hundred terms that are added up in
float64, and handed to the op. Short floats, which are coarser than that, are
left to the op.

Where the mean is large against the standard deviation no sums of the inputs
tell the variance. The moments are looked at, inside the graph, and such data
are normalized again after subtracting the first mean: shifted data, Chan, Golub
& LeVeque, "Algorithms for computing the sample variance", 1983.

The op is slow where the channels do not fill vector registers. There rows are
laid side by side, as further channels.
"""

import math

import tensorflow as tf

from keras_bn.kernels.tensorflow import plain
from keras_bn.kernels.tensorflow.views import along
from keras_bn.kernels.tensorflow.views import channels_last
from keras_bn.kernels.tensorflow.views import has_gpu
from keras_bn.kernels.tensorflow.views import is_small
from keras_bn.kernels.tensorflow.views import positions
from keras_bn.kernels.tensorflow.views import undo_channels_last

# A mean of k standard deviations costs a factor `1 + k**2` in the error of the
# variance; above this many it is subtracted first.
_LARGE_MEAN = 8.0

# Rows that are added one after the other, and the channels that the op is given
# at most for that.
_GROUP = 256
_GROUPED_WIDTH = 4096


def moments(inputs, axis):
    """`(mean, variance, count)` of each channel, right at any mean."""
    channels = inputs.shape[axis]
    x = channels_last(inputs, axis)
    if is_small(inputs) or _adds_well(x):
        ones, zeros = tf.ones([channels]), tf.zeros([channels])
        _, mean, variance, *_ = normalize_once(
            x, ones, zeros, 1.0, is_small(inputs)
        )
    else:
        mean, variance = moments_of_rows(tf.reshape(x, [-1, channels]))
    return mean, variance, positions(inputs, channels)


def normalize(inputs, gamma, beta, axis, epsilon):
    """`(outputs, mean, variance, count)`, with the gradient of training."""
    small = is_small(inputs)

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        x = channels_last(inputs, axis)
        outputs, mean, variance, *saved = normalize_once(
            x, gamma, beta, epsilon, small
        )

        def gradient(output_gradient, *_):
            return gradients(
                output_gradient, inputs, gamma, saved, axis, epsilon
            )

        outputs = undo_channels_last(outputs, inputs, axis)
        return (outputs, mean, variance), gradient

    outputs, mean, variance = normalize(inputs, gamma, beta)
    return outputs, mean, variance, positions(inputs, inputs.shape[axis])


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """Normalizes with given moments, by the cheaper of the two ways."""
    # cuDNN refuses a batch of more than 65,535 here, and has no deterministic
    # gradient. Two passes of multiply-add are cheaper than two transposes.
    transposed = inputs.dtype == tf.float32 and axis != inputs.shape.rank - 1
    repeats = _repeats(inputs, axis)
    if has_gpu() or transposed or repeats is None or is_small(inputs):
        return plain.normalize_with(
            inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
        )
    # The op has no gradient for its moments. These expressions have the values
    # of gamma and beta, and carry it.
    inverse = tf.math.rsqrt(variance + epsilon)
    constant_mean, constant_inverse = map(tf.stop_gradient, (mean, inverse))
    beta = beta - gamma * constant_inverse * (mean - constant_mean)
    gamma = gamma * tf.math.divide_no_nan(inverse, constant_inverse)
    outputs, *_ = tf.raw_ops.FusedBatchNormV3(
        x=_side_by_side(channels_last(inputs, axis), repeats),
        scale=tf.tile(gamma, [repeats]),
        offset=tf.tile(beta, [repeats]),
        mean=tf.tile(mean, [repeats]),
        variance=tf.tile(variance, [repeats]),
        epsilon=epsilon,
        is_training=False,
    )
    return undo_channels_last(outputs, inputs, axis)


def moments_of_rows(rows):
    """Mean and variance of the rows `[n, channels]`, right at any mean."""
    mean, variance = grouped_moments(rows, 1)
    large = _is_large(mean, variance)

    def shifted():
        shift = _shift(mean, large, rows.dtype)
        rest, variance = grouped_moments(rows - shift, 1)
        return tf.cast(shift, tf.float32) + rest, variance

    return tf.cond(tf.reduce_any(large), shifted, lambda: (mean, variance))


def _is_large(mean, variance):
    return tf.square(mean) > _LARGE_MEAN**2 * variance


def _shift(mean, large, dtype):
    """What to subtract: short floats near 0 would only be rounded by it."""
    return tf.cast(tf.where(large, mean, 0.0), dtype)


def grouped_moments(inputs, axis):
    """Mean and variance by groups of rows: no sum in them is a long one.

    Right where the mean is not large against the standard deviation.
    """
    channels = inputs.shape[axis]
    rows = tf.reshape(channels_last(inputs, axis), [-1, channels])
    if rows.dtype == tf.float32 and not has_gpu():
        return _moments_by_sums(rows)
    return _merged_moments(rows)


def _moments_by_sums(rows):
    """Sums of float32 rows and of their squares, on a CPU.

    Rows laid side by side are further channels, each a sum of its own. Sums
    are products with a row of ones. Sums of squares are the gradient of a
    depthwise convolution's filter of one element, which reads the rows once
    and writes nothing of their size.
    """
    channels = rows.shape[1]
    count = rows.shape[0]
    known = count is not None
    maximum = max if known else tf.maximum
    count = count if known else tf.shape(rows)[0]
    groups = maximum(count // _GROUP, 1)
    # Oddly many channels side by side fill no vector registers.
    step = 16 // math.gcd(16, channels)
    groups = maximum(groups - groups % step, 1)
    block = max(min(count, 16), 1) if known else 16
    length = count // groups // block * block
    width = groups * channels

    x = tf.reshape(rows[: length * groups], [length, width])
    first = tf.matmul(tf.ones([1, length]), x)
    x = tf.reshape(x, [length // block, block, 1, width])
    second = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=x,
        filter_sizes=[1, 1, width, 1],
        out_backprop=x,
        strides=[1, 1, 1, 1],
        padding="VALID",
    )
    if not known or not length:
        # Of no rows at all the op leaves its result as it found the memory.
        second = tf.math.multiply_no_nan(
            second, tf.cast(tf.minimum(length, 1), tf.float32)
        )
    sums = [
        tf.reduce_sum(
            tf.cast(tf.reshape(s, [groups, channels]), tf.float64), 0
        )
        for s in (first, second)
    ]
    if not known or length * groups < count:
        rest = tf.cast(rows[length * groups :], tf.float64)
        sums[0] += tf.reduce_sum(rest, 0)
        sums[1] += tf.reduce_sum(tf.square(rest), 0)
    mean, square = (s / tf.cast(maximum(count, 1), tf.float64) for s in sums)
    variance = tf.maximum(square - tf.square(mean), 0.0)
    return tf.cast(mean, tf.float32), tf.cast(variance, tf.float32)


def _merged_moments(rows):
    """By the op, whose moments of groups are merged as in Chan et al."""
    channels = rows.shape[1]
    most = max(1, _GROUPED_WIDTH // channels)
    if rows.shape[0] is None:
        count = tf.shape(rows)[0]
        groups = tf.minimum(count // _GROUP, most)
        groups = tf.maximum(groups - groups % 16, 1)
    else:
        count = rows.shape[0]
        groups = min(count // _GROUP, most)
        groups = max(groups - groups % 16, 1)
    rest = count % groups
    width = groups * channels
    x = tf.reshape(rows[: count - rest], [-1, 1, 1, width])
    _, mean, variance, *_ = _fused_op(x, tf.ones([width]), tf.zeros([width]), 1)
    means = tf.reshape(mean, [groups, channels])
    variances = tf.reshape(variance, [groups, channels])

    left_over = tf.cast(rows[count - rest :], tf.float32)
    divisor = tf.cast(tf.maximum(rest, 1), tf.float32)
    mean = tf.reduce_sum(left_over, 0, keepdims=True) / divisor
    deviations = tf.square(left_over - mean)
    variance = tf.reduce_sum(deviations, 0, keepdims=True) / divisor
    means = tf.concat([means, mean], 0)
    variances = tf.concat([variances, variance], 0)

    share = tf.cast(tf.fill([groups, 1], (count - rest) // groups), tf.float32)
    share = tf.concat([share, [[tf.cast(rest, tf.float32)]]], 0)
    share /= tf.cast(tf.maximum(count, 1), tf.float32)
    # Not a product of matrices, which a GPU may round to TF32.
    mean = tf.reduce_sum(share * means, 0)
    variances += tf.square(means - mean)
    return mean, tf.reduce_sum(share * variances, 0)


# Below, `x` is `[a, b, 1, channels]`, and what normalizes it gives `(outputs,
# mean, variance, saved_1, saved_2, saved_3)`; the last three are what the op's
# gradient wants: the mean, the variance on CPU or its inverse root on GPU, and
# cuDNN's own space.


def normalize_once(x, gamma, beta, epsilon, small):
    """Normalizes with the batch's moments, right at any mean."""
    if small:
        outputs, mean, variance = plain.normalize_few(x, gamma, beta, epsilon)
        return outputs, mean, variance, mean, variance, tf.zeros([])
    normalize = _by_the_op if _adds_well(x) else _by_moments
    return normalize(x, gamma, beta, epsilon)


def _adds_well(x):
    """Whether the op is fast, and its own sums are as good as the inputs."""
    if has_gpu():
        return True
    return x.dtype != tf.float32 and _fits(x.shape[-1], x.dtype)


def _by_the_op(x, gamma, beta, epsilon):
    first = _fused_op(x, gamma, beta, epsilon)
    _, mean, variance, *_ = first
    large = _is_large(mean, variance)

    def shifted():
        shift = _shift(mean, large, x.dtype)
        outputs, *moments, saved_1, saved_2, saved_3 = _fused_op(
            x - shift, gamma, beta, epsilon
        )
        shift = tf.cast(shift, tf.float32)
        return (
            outputs,
            moments[0] + shift,
            moments[1],
            saved_1 + shift,
            saved_2,
            saved_3,
        )

    return tf.cond(tf.reduce_any(large), shifted, lambda: first)


def _by_moments(x, gamma, beta, epsilon):
    mean, variance = grouped_moments(x, 3)
    large = _is_large(mean, variance)

    def normalized(x, mean, variance):
        return normalize_with(
            x, mean, variance, gamma, beta, axis=3, epsilon=epsilon
        )

    def shifted():
        shift = _shift(mean, large, x.dtype)
        moved = x - shift
        rest, variance = grouped_moments(moved, 3)
        outputs = normalized(moved, rest, variance)
        return outputs, tf.cast(shift, tf.float32) + rest, variance

    outputs, mean, variance = tf.cond(
        tf.reduce_any(large),
        shifted,
        lambda: (normalized(x, mean, variance), mean, variance),
    )
    return outputs, mean, variance, mean, variance, tf.zeros([])


def _fused_op(x, gamma, beta, epsilon):
    outputs, mean, variance, *saved = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=tf.zeros([0]),
        variance=tf.zeros([0]),
        epsilon=epsilon,
        is_training=True,
    )
    return outputs, *_undo_bessel(mean, variance, x), *saved


def _undo_bessel(mean, variance, x):
    """From the op's variance, divided by N - 1, to the one divided by N."""
    if x.shape.is_fully_defined() and x.shape.num_elements():
        count = x.shape.num_elements() // x.shape[-1]
        if count == 1:
            # Divided by 0, which a CPU does not do, but cuDNN does.
            return mean, tf.zeros_like(variance)
        return mean, variance * ((count - 1) / count)
    # The op says NaN for both moments of an empty batch.
    count = tf.cast(tf.size(x) // tf.maximum(tf.shape(x)[-1], 1), tf.float32)
    factor = tf.maximum(count - 1.0, 0.0) / tf.maximum(count, 1.0)
    return (
        tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0)),
        tf.math.multiply_no_nan(variance, factor),
    )


def gradients(output_gradient, inputs, gamma, saved, axis, epsilon):
    """Of the inputs, gamma and beta, from what the op wants saved."""
    if _fits(inputs.shape[axis], inputs.dtype):
        return _narrow_gradients(
            output_gradient, inputs, gamma, saved, axis, epsilon
        )
    mean, variance, _ = saved
    moments = mean, variance, positions(inputs, inputs.shape[axis])
    return wide_gradients(
        output_gradient, inputs, gamma, moments, axis, epsilon
    )


def _narrow_gradients(output_gradient, inputs, gamma, saved, axis, epsilon):
    gradients = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=channels_last(output_gradient, axis),
        x=channels_last(inputs, axis),
        scale=gamma,
        reserve_space_1=saved[0],
        reserve_space_2=saved[1],
        reserve_space_3=saved[2],
        epsilon=epsilon,
        is_training=True,
    )
    return (
        undo_channels_last(gradients.x_backprop, inputs, axis),
        gradients.scale_backprop,
        gradients.offset_backprop,
    )


def wide_gradients(
    output_gradient,
    inputs,
    gamma,
    moments,
    axis,
    epsilon,
    mask=None,
    replicas=None,
):
    """With rows side by side the op gives the sums, under a mask too.

    In float32 its `dy * factor` serves too, and what comes through the
    moments, `slope * (x - mean) + shift`, is another call of it. Short floats
    would be rounded in between.
    """
    mean, variance, count = moments
    channels = inputs.shape[axis]
    repeats = _repeats(inputs, axis)
    settings = {"axis": axis, "epsilon": epsilon}

    def composed(output_gradient, inputs, gamma):
        return plain.gradients(
            output_gradient,
            inputs,
            gamma,
            *moments,
            mask=mask,
            replicas=replicas,
            **settings,
        )

    if repeats is None:
        return composed(output_gradient, inputs, gamma)

    def kept(x):
        if mask is None:
            return x
        # 0 where the mask is, whatever `x` is there.
        return tf.math.multiply_no_nan(x, tf.cast(mask, x.dtype))

    @tf.custom_gradient
    def gradients_and_second(output_gradient, inputs, gamma):
        first = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=_side_by_side(
                channels_last(output_gradient, axis), repeats
            ),
            x=_side_by_side(channels_last(inputs, axis), repeats),
            scale=tf.tile(gamma, [repeats]),
            reserve_space_1=tf.tile(mean, [repeats]),
            reserve_space_2=tf.tile(variance, [repeats]),
            reserve_space_3=tf.zeros([]),
            epsilon=epsilon,
            is_training=False,
        )
        sums = [first.scale_backprop, first.offset_backprop]
        of_gamma, of_beta = (
            tf.reduce_sum(tf.reshape(s, [repeats, channels]), 0) for s in sums
        )
        factor = gamma * tf.math.rsqrt(variance + epsilon)
        share = factor / tf.cast(tf.maximum(count, 1), tf.float32)

        def from_sums():
            totals = tf.stack([of_gamma, of_beta])
            if replicas is not None:
                totals = replicas.total(totals)
            slope, shift = tf.unstack(share * totals)
            if inputs.dtype == tf.float32:
                scaled = undo_channels_last(first.x_backprop, inputs, axis)
                through_moments = normalize_with(
                    inputs, mean, variance, slope, shift, **settings
                )
                return scaled - kept(through_moments), of_gamma, of_beta
            slope *= tf.math.rsqrt(variance + epsilon)
            shift -= mean * slope
            by, slope, shift = (
                along(axis, v, inputs.shape.rank)
                for v in (factor, slope, shift)
            )
            of_inputs = tf.cast(output_gradient, tf.float32) * by
            of_inputs -= kept(tf.cast(inputs, tf.float32) * slope + shift)
            return tf.cast(of_inputs, inputs.dtype), of_gamma, of_beta

        if mask is None:
            results = from_sums()
        else:
            # A masked NaN that no gradient comes back for is in the sums. Not
            # with replicas, of which only some may see one.
            results = tf.cond(
                tf.reduce_all(tf.math.is_finite(of_gamma)),
                from_sums,
                lambda: composed(output_gradient, inputs, gamma),
            )

        def second(*upstream):
            sources = output_gradient, inputs, gamma
            return plain.pulled_back(composed, sources, upstream)

        return results, second

    return gradients_and_second(output_gradient, inputs, gamma)


def _fits(channels, dtype):
    """Whether the channels of one row fill the op's vector registers."""
    return has_gpu() or channels % (4 if dtype == tf.float32 else 16) == 0


def _repeats(inputs, axis):
    """How many rows side by side are fast, or None where that is not known."""
    channels = inputs.shape[axis]
    if _fits(channels, inputs.dtype):
        return 1
    sizes = [n for i, n in enumerate(inputs.shape) if i != axis]
    known = math.prod(n for n in sizes if n is not None)
    repeats = math.gcd(known, 128 if channels < 32 else 16)
    return repeats if _fits(repeats * channels, inputs.dtype) else None


def _side_by_side(x, repeats):
    if repeats == 1:
        return x
    return tf.reshape(x, [-1, 1, 1, repeats * x.shape[-1]])

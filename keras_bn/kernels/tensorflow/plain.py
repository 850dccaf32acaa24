"""Batch normalization in plain TensorFlow ops."""

import tensorflow as tf

from keras_bn.kernels.tensorflow.views import along
from keras_bn.kernels.tensorflow.views import channels_last
from keras_bn.kernels.tensorflow.views import divisor
from keras_bn.kernels.tensorflow.views import moments_type
from keras_bn.kernels.tensorflow.views import positions

# Rows that are added one after the other.
_FEW = 256


def sum_of_positions(x, axis):
    """The sum of each channel."""
    return tf.reduce_sum(x, [i for i in range(x.shape.rank) if i != axis])


def sum_of_few(x, axis):
    """The same of few float32 elements on a CPU, where it is cheaper."""
    return _sum_of_rows(tf.reshape(channels_last(x, axis), [-1, x.shape[axis]]))


def _sum_of_rows(rows):
    """By a product with a row of ones: the cheapest sum over rows there is.

    It may add them one after the other: many are laid side by side first.
    """
    channels = rows.shape[1]
    if channels == 1:
        return tf.reduce_sum(rows, 0)
    count, most = rows.shape[0], max
    if count is None:
        count, most = tf.shape(rows)[0], tf.maximum
    groups = most(count // _FEW, 1)
    length = count // groups
    x = tf.reshape(rows[: length * groups], [length, groups * channels])
    sums = tf.matmul(tf.ones([1, length]), x)
    total = tf.reduce_sum(tf.reshape(sums, [groups, channels]), 0)
    if not isinstance(count, int) or length * groups < count:
        total += tf.reduce_sum(rows[length * groups :], 0)
    return total


def moments(inputs, axis, mask=None, count=None, total=sum_of_positions):
    """`(mean, variance, count)` by shifted sums.

    Under a `mask` the `count` of the positions that it keeps is given.
    `total` sums the positions.
    """
    inputs = tf.cast(inputs, moments_type(inputs.dtype))
    rank = inputs.shape.rank
    if mask is None:
        count = positions(inputs, inputs.shape[axis])
    else:
        inputs = tf.where(mask, inputs, 0.0)
    shift = total(inputs, axis) / divisor(count)
    deviations = inputs - along(axis, shift, rank)
    if mask is not None:
        deviations = tf.where(mask, deviations, 0.0)
    rest = total(deviations, axis) / divisor(count)
    square = total(tf.square(deviations), axis) / divisor(count)
    return shift + rest, _variance(square, rest), count


def _variance(square, rest):
    """From the mean square of deviations and their mean, which is small.

    Where all elements are one number both are rounding, and the difference may
    be less than 0.
    """
    return tf.maximum(square - tf.square(rest), 0.0)


def normalize_few(x, gamma, beta, epsilon):
    """The cheapest way for few elements `[a, b, 1, channels]` on a CPU.

    The deviations from the first mean give its rounding error.

    Returns:
        `(outputs, mean, variance)`, the moments in float32.
    """
    channels = x.shape[-1]
    rows = tf.cast(tf.reshape(x, [-1, channels]), tf.float32)
    count = divisor(positions(x, channels))
    shift = _sum_of_rows(rows) / count
    deviations = rows - shift
    rest = _sum_of_rows(deviations) / count
    mean = shift + rest
    variance = _variance(_sum_of_rows(tf.square(deviations)) / count, rest)
    factor = gamma * tf.math.rsqrt(variance + epsilon)
    outputs = deviations * factor + (beta - rest * factor)
    outputs = tf.cast(tf.reshape(outputs, tf.shape(x)), x.dtype)
    return outputs, mean, variance


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """A multiplication and an addition, in the dtype of the moments."""
    rank = inputs.shape.rank
    factor = gamma * tf.math.rsqrt(variance + epsilon)
    offset = beta - mean * factor
    outputs = tf.cast(inputs, mean.dtype) * along(axis, factor, rank)
    return tf.cast(outputs + along(axis, offset, rank), inputs.dtype)


def gradients(
    output_gradient,
    inputs,
    gamma,
    mean,
    variance,
    count,
    *,
    axis,
    epsilon,
    mask=None,
    replicas=None,
):
    """Gradients of the inputs, gamma and beta, differentiable once more.

    With `replicas` the moments are those of all, and what comes through them
    too; the gradients of gamma and beta are those of this one. Whichever way
    a replica takes, it sends the same two sums in the same order.
    """
    rank = inputs.shape.rank
    reduced = [i for i in range(rank) if i != axis]

    def means(*sums):
        if replicas is not None:
            sums = tf.unstack(replicas.total(tf.stack(sums)))
        return (s / divisor(count) for s in sums)

    dtype = moments_type(inputs.dtype)

    def composed(output_gradient, inputs, known_moments):
        dy = tf.cast(output_gradient, dtype)
        deviation = tf.cast(inputs, dtype) - along(axis, mean, rank)
        inverse = tf.math.rsqrt(variance + epsilon)
        if not known_moments:
            # As a function of the inputs, from the deviations.
            counted = deviation
            if mask is not None:
                counted = tf.where(mask, deviation, 0.0)
            rest, square = means(
                tf.reduce_sum(counted, reduced),
                tf.reduce_sum(tf.square(counted), reduced),
            )
            inverse = tf.math.rsqrt(_variance(square, rest) + epsilon)
            deviation -= along(axis, rest, rank)
        normalized = deviation * along(axis, inverse, rank)
        # A masked NaN that no gradient comes back for stays out of it.
        weighted = tf.math.multiply_no_nan(normalized, dy)
        gamma_gradient = tf.reduce_sum(weighted, reduced)
        beta_gradient = tf.reduce_sum(dy, reduced)
        slope, through_mean = means(gamma_gradient, beta_gradient)
        through_moments = along(axis, through_mean, rank)
        through_moments += normalized * along(axis, slope, rank)
        if mask is not None:
            through_moments = tf.where(mask, through_moments, 0.0)
        return dy - through_moments, inverse, gamma_gradient, beta_gradient

    # A custom gradient ties its results to each other until the graph is
    # optimized. Were one of them computed from gamma, TensorFlow would take
    # gamma's gradient for computed from it too, and no longer wait for the
    # other readers of gamma before an optimizer in the same graph writes to it.
    @tf.custom_gradient
    def without_gamma(*sources):
        def second(*upstream):
            return pulled_back(
                lambda *sources: composed(*sources, known_moments=False),
                sources,
                upstream,
            )

        return composed(*sources, known_moments=True), second

    unscaled, inverse, *of_vectors = without_gamma(output_gradient, inputs)
    input_gradient = unscaled * along(axis, inverse * gamma, rank)
    return tf.cast(input_gradient, inputs.dtype), *of_vectors


def pulled_back(function, sources, upstream):
    """The gradient of `function(*sources)`, itself differentiable."""
    with tf.GradientTape() as tape:
        tape.watch(sources)
        targets = function(*sources)
    return tape.gradient(targets, sources, upstream)

"""TensorFlow kernels, on the fused op that Keras 3 no longer uses.

`FusedBatchNormV3` reads float16, bfloat16 and float32 inputs as they are and
keeps its moments in float32. It knows one layout well, channels last, so every
input is seen as `[a, b, 1, channels]`: a reshape where the channel axis is the
last, a transpose where it is not. float64 has no fused kernel and takes the
same steps in plain ops.

The op adds naively. Where the mean is large against the deviation its moments
are wrong (at 131,072 rows and a mean of 1e4 deviations the variance is 8 times
too large), so the moments it returns are looked at, inside the graph, and such
data are normalized again after subtracting the first mean: shifted data, Chan,
Golub & LeVeque, "Algorithms for computing the sample variance", 1983.
"""

import math

import tensorflow as tf

# A mean above this many standard deviations is worth the corrected path. At 30
# the fused op's variance is still within 2e-5 of the float64 one.
_LARGE_MEAN = 30.0

# Up to this many elements the fused op spends more on waking its threads than
# on the arithmetic, and plain ops on one thread are cheaper, in low precision
# too, where they work on a float32 copy (of half a megabyte at most).
_SMALL = 2**17

# What a size that the graph does not know, as the batch's, is taken for. A
# `tf.cond` on the true size would stay in every exported model.
_UNKNOWN_SIZE = 64


def batch_moments(inputs, *, axis, mask=None, synchronized=False):
    """Mean, biased variance and count of each channel. See the package."""
    inputs = tf.stop_gradient(inputs)
    channels = inputs.shape[axis]
    if mask is not None:
        mean, variance, count = _masked_moments(inputs, mask, axis)
    elif inputs.dtype == tf.float64:
        rank = inputs.shape.rank
        reduced = [i for i in range(rank) if i != axis]
        count = _positions(inputs, channels)
        divisor = _divisor(count)
        shift = tf.reduce_sum(inputs, reduced) / divisor
        deviations = inputs - _along(axis, shift, rank)
        rest = tf.reduce_sum(deviations, reduced) / divisor
        mean = shift + rest
        variance = tf.reduce_sum(tf.square(deviations), reduced) / divisor
        variance -= tf.square(rest)
    else:
        count = _positions(inputs, channels)
        gamma, beta = _defaults(inputs, None, None, axis)
        x = _channels_last(inputs, axis)
        normalize = _plain if _is_small(inputs) else _fused
        _, mean, variance, *_ = normalize(x, gamma, beta, channels, 1.0)
    if synchronized:
        mean, variance, count = _merge_replicas(mean, variance, count)
    return mean, variance, count


def normalize_batch(
    inputs,
    gamma,
    beta,
    *,
    axis,
    epsilon,
    mask=None,
    moments=None,
    synchronized=False,
):
    """Normalizes with the moments of the batch. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    plain = mask is None and moments is None and not synchronized
    if plain and inputs.dtype != tf.float64:
        return _normalize_fused(inputs, gamma, beta, axis, epsilon)
    if moments is None:
        moments = batch_moments(
            inputs, axis=axis, mask=mask, synchronized=synchronized
        )
    outputs = _normalize_composed(
        inputs, gamma, beta, moments, mask, axis, epsilon, synchronized
    )
    return outputs, *moments


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """Normalizes with given moments. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    rank = inputs.shape.rank

    # Two passes of multiply-add are cheaper than two transposes.
    transposed = inputs.dtype == tf.float32 and axis != rank - 1
    if inputs.dtype == tf.float64 or transposed or _is_small(inputs):
        factor = gamma * tf.math.rsqrt(variance + epsilon)
        offset = beta - mean * factor
        outputs = tf.cast(inputs, mean.dtype) * _along(axis, factor, rank)
        return tf.cast(outputs + _along(axis, offset, rank), inputs.dtype)
    outputs, *_ = tf.raw_ops.FusedBatchNormV3(
        x=_channels_last(inputs, axis),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )
    return _undo_channels_last(outputs, inputs, axis)


def _normalize_fused(inputs, gamma, beta, axis, epsilon):
    channels = inputs.shape[axis]

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        x = _channels_last(inputs, axis)
        normalize = _plain if _is_small(inputs) else _fused
        outputs, mean, variance, *saved = normalize(
            x, gamma, beta, channels, epsilon
        )

        def gradient(output_gradient, *_):
            gradients = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=_channels_last(output_gradient, axis),
                x=_channels_last(inputs, axis),
                scale=gamma,
                reserve_space_1=saved[0],
                reserve_space_2=saved[1],
                reserve_space_3=saved[2],
                epsilon=epsilon,
                is_training=True,
            )
            return (
                _undo_channels_last(gradients.x_backprop, inputs, axis),
                gradients.scale_backprop,
                gradients.offset_backprop,
            )

        outputs = _undo_channels_last(outputs, inputs, axis)
        return (outputs, mean, variance), gradient

    outputs, mean, variance = normalize(inputs, gamma, beta)
    return outputs, mean, variance, _positions(inputs, channels)


def _fused(x, gamma, beta, channels, epsilon):
    """The fused op on `[a, b, 1, channels]`, right at any mean.

    Returns:
        `(outputs, mean, variance, saved_1, saved_2, saved_3)`; the last three
        are what the op's gradient wants: the mean, the variance on CPU or its
        inverse root on GPU, and cuDNN's own space.
    """
    first = _fused_op(x, gamma, beta, epsilon)

    def shifted():
        shift = tf.cast(first.batch_mean, x.dtype)
        second = _fused_op(x - shift, gamma, beta, epsilon)
        shift = tf.cast(shift, tf.float32)
        return second._replace(
            batch_mean=second.batch_mean + shift,
            reserve_space_1=second.reserve_space_1 + shift,
        )

    large = tf.reduce_any(
        tf.square(first.batch_mean) > _LARGE_MEAN**2 * first.batch_variance
    )
    outputs, mean, variance, *saved = tf.cond(large, shifted, lambda: first)
    mean, variance = _undo_bessel(mean, variance, x, channels)
    return outputs, mean, variance, *saved


def _plain(x, gamma, beta, channels, epsilon):
    """What `_fused` does, in plain ops on a CPU, for few elements.

    A product with a row of ones is the cheapest sum over rows there is. The
    deviations from the first mean give its rounding error.
    """
    rows = tf.cast(tf.reshape(x, [-1, channels]), tf.float32)
    count = _divisor(_positions(x, channels))
    ones = tf.ones([1, tf.shape(rows)[0]])

    def mean_of_rows(rows):
        return tf.reshape(tf.matmul(ones, rows), [channels]) / count

    shift = mean_of_rows(rows)
    deviations = rows - shift
    rest = mean_of_rows(deviations)
    mean = shift + rest
    variance = mean_of_rows(tf.square(deviations)) - tf.square(rest)
    factor = gamma * tf.math.rsqrt(variance + epsilon)
    outputs = deviations * factor + (beta - rest * factor)
    outputs = tf.cast(tf.reshape(outputs, tf.shape(x)), x.dtype)
    return outputs, mean, variance, mean, variance, tf.zeros([])


def _is_small(inputs):
    """Whether plain ops are cheaper here than the fused one."""
    if tf.config.list_physical_devices("GPU"):
        return False
    sizes = [_UNKNOWN_SIZE if n is None else n for n in inputs.shape.as_list()]
    return math.prod(sizes) <= _SMALL


def _fused_op(x, gamma, beta, epsilon):
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=tf.zeros([0]),
        variance=tf.zeros([0]),
        epsilon=epsilon,
        is_training=True,
    )


def _undo_bessel(mean, variance, x, channels):
    """From the op's variance, divided by N - 1, to the one divided by N."""
    if x.shape.is_fully_defined() and x.shape.num_elements():
        count = x.shape.num_elements() // max(channels, 1)
        return mean, variance * ((count - 1) / count)
    # The op says NaN for both moments of an empty batch.
    count = tf.cast(_positions(x, channels), tf.float32)
    factor = tf.maximum(count - 1.0, 0.0) / tf.maximum(count, 1.0)
    return (
        tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0)),
        tf.math.multiply_no_nan(variance, factor),
    )


def _masked_moments(inputs, mask, axis):
    """Moments of the positions where `mask` is True, in two rounds.

    Masked positions are set to one value, which makes all positions two groups
    whose moments merge as in Chan et al.; this is that merge backwards. The
    first round takes 0 and finds the mean, the second takes a mean that is not
    small against the deviation.
    """
    rank = inputs.shape.rank
    channels = inputs.shape[axis]
    dtype = _moments_type(inputs.dtype)
    positions = tf.cast(_positions(inputs, channels), dtype)
    # float32 would not count beyond 2**24.
    total = tf.reduce_sum(
        tf.cast(mask, tf.float64), [i for i in range(rank) if i != axis]
    )
    of = tf.cast(tf.size(mask) // tf.shape(mask)[axis], tf.float64)
    share = tf.broadcast_to(tf.math.divide_no_nan(total, of), [channels])
    share = tf.cast(share, dtype)
    count = tf.round(share * positions)
    rate = tf.math.divide_no_nan(positions, count)
    mean = variance = tf.zeros([channels], dtype)
    for _ in range(2):
        center = tf.where(tf.square(mean) > variance, mean, 0.0)
        center = tf.cast(center, inputs.dtype)
        along = _along(axis, center, rank)
        center = tf.cast(center, dtype)
        if inputs.dtype == dtype:
            zero = tf.zeros([], dtype)
            moved = tf.where(mask, inputs - along, zero)
            deviation, variance, _ = batch_moments(moved, axis=axis)
        else:
            # A difference of short floats is rounded; filling in is exact.
            moved = tf.where(mask, inputs, along)
            deviation, variance, _ = batch_moments(moved, axis=axis)
            deviation = deviation - center
        deviation = deviation * rate
        mean = center + deviation
        variance = rate * variance - tf.square(deviation) * (1.0 - share)
    return mean, tf.maximum(variance, 0.0), count


def _normalize_composed(
    inputs, gamma, beta, moments, mask, axis, epsilon, synchronized
):
    """Normalizes with moments of these inputs; the gradient is in plain ops.

    Only the inputs and the mask are kept for it. It finds the moments again,
    as a function of the inputs, so that it can be differentiated once more.
    """
    rank = inputs.shape.rank
    reduced = [i for i in range(rank) if i != axis]

    def total(x):
        x = tf.reduce_sum(x, reduced)
        context = _replica_context() if synchronized else None
        if context is None:
            return x
        return context.all_reduce(tf.distribute.ReduceOp.SUM, x)

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        mean, variance, count = moments
        outputs = normalize_with(
            inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
        )
        shift = _along(axis, mean, rank)
        divisor = _divisor(count)

        def gradient(output_gradient):
            dy = tf.cast(output_gradient, mean.dtype)
            deviation = tf.cast(inputs, mean.dtype) - shift
            counted = deviation
            if mask is not None:
                counted = tf.where(mask, deviation, 0.0)
            rest = total(counted) / divisor
            square = total(tf.square(counted)) / divisor - tf.square(rest)
            inverse = tf.math.rsqrt(square + epsilon)
            normalized = (deviation - _along(axis, rest, rank)) * _along(
                axis, inverse, rank
            )
            # A masked NaN that no gradient comes back for stays out of it.
            weighted = tf.math.multiply_no_nan(normalized, dy)
            gamma_gradient = tf.reduce_sum(weighted, reduced)
            beta_gradient = tf.reduce_sum(dy, reduced)
            factor = inverse * gamma
            through = _along(
                axis, total(dy) / divisor, rank
            ) + normalized * _along(axis, total(weighted) / divisor, rank)
            if mask is not None:
                through = tf.where(mask, through, 0.0)
            input_gradient = (dy - through) * _along(axis, factor, rank)
            return (
                tf.cast(input_gradient, inputs.dtype),
                gamma_gradient,
                beta_gradient,
            )

        return outputs, gradient

    return normalize(inputs, gamma, beta)


def _replica_context():
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context


def _merge_replicas(mean, variance, count):
    """Merges the replicas' moments exactly, with one collective.

    Each replica fills one row of a table of counts, means and variances; the
    sum over replicas is the whole table (Chan et al. for the merge).
    """
    context = _replica_context()
    if context is None:
        return mean, variance, count
    replicas = context.num_replicas_in_sync
    channels = mean.shape[0]
    count = tf.broadcast_to(tf.cast(count, mean.dtype), [channels])
    row = tf.concat([count, mean, variance], axis=0)
    replica = tf.reshape(context.replica_id_in_sync_group, [1, 1])
    table = tf.scatter_nd(replica, row[None], [replicas, 3 * channels])
    table = context.all_reduce(tf.distribute.ReduceOp.SUM, table)
    counts, means, variances = tf.split(table, 3, axis=1)
    count = tf.reduce_sum(counts, 0)
    share = counts / tf.maximum(count, 1.0)
    mean = tf.reduce_sum(share * means, 0)
    mean += tf.reduce_sum(share * (means - mean), 0)
    variance = tf.reduce_sum(
        share * (variances + tf.square(means - mean)), 0
    )
    return mean, variance, count


def _moments_type(dtype):
    return tf.float64 if dtype == tf.float64 else tf.float32


def _defaults(inputs, gamma, beta, axis):
    shape, dtype = [inputs.shape[axis]], _moments_type(inputs.dtype)
    gamma = tf.ones(shape, dtype) if gamma is None else gamma
    beta = tf.zeros(shape, dtype) if beta is None else beta
    return gamma, beta


def _along(axis, vector, rank):
    return tf.reshape(vector, [-1] + [1] * (rank - 1 - axis))


def _positions(x, channels):
    """How many positions each channel has: an int where the shape is known."""
    if x.shape.is_fully_defined():
        return x.shape.num_elements() // max(channels, 1)
    return tf.cast(tf.size(x) // channels, _moments_type(x.dtype))


def _divisor(count):
    return max(count, 1) if isinstance(count, int) else tf.maximum(count, 1.0)


def _channels_last(x, axis):
    """A view of `x` as `[a, b, 1, channels]`, the layout the op is fast at."""
    if axis != x.shape.rank - 1:
        x = tf.transpose(x, _to_last(axis, x.shape.rank))
    shape = x.shape.as_list()
    *positions, channels = shape
    width = _width(positions, channels, x.dtype)
    if None in positions:
        return tf.reshape(x, [-1, width, 1, channels])
    rows = math.prod(positions) // width
    return tf.reshape(x, [rows, width, 1, channels])


def _undo_channels_last(x, like, axis):
    rank = like.shape.rank
    if like.shape.is_fully_defined():
        shape = like.shape.as_list()
    else:
        shape = tf.shape(like)
    if axis == rank - 1:
        return tf.reshape(x, shape)
    order = _to_last(axis, rank)
    shape = [shape[i] for i in order]
    back = sorted(range(rank), key=order.__getitem__)
    return tf.transpose(tf.reshape(x, shape), back)


def _to_last(axis, rank):
    return [i for i in range(rank) if i != axis] + [axis]


def _width(positions, channels, dtype):
    """The second dimension of the view, a divisor of the known positions.

    The op splits its work along the first. With a single column it takes
    another way, which is the faster one for wide float32 rows only (measured,
    see BUILD_NOTES.md).
    """
    if dtype == tf.float32 and 192 <= channels <= 512:
        return 1
    known = math.prod(n for n in positions if n is not None)
    return math.gcd(known, 8) if known else 1

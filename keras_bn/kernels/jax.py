"""Batch normalization in pure JAX; the contract is in the package's docstring.

How the moments are computed. Each channel is shifted by the mean of a few of
its own elements, and one pass over the inputs sums the deviations `d` from
that shift and their squares (Chan, Golub & LeVeque, 1983, "Algorithms for
computing the sample variance", section 3):

    mean     = shift + sum(d) / count
    variance = sum(d**2) / count - (sum(d) / count)**2

The difference in the second line loses digits only where the shift is several
deviations away from the mean. The result itself tells when that happened, and
then a second pass is made with the first one's mean as the shift.

How the sums are laid out. `_paired_sums` adds up a few slices of the inputs
element by element, both sums in one loop over memory, and leaves the small
result to ordinary reductions. XLA compiles a reduction of a short dimension to
a vectorized loop, and the two levels of summation keep the rounding error of
long sums low.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# Into how many slices `_paired_sums` may cut; few enough to be unrolled.
_SLICES = range(4, 17)
_SHIFT_SAMPLES = 16
# A shift `k` deviations off costs a factor `1 + k**2` in the error of the
# variance.
_SHIFT_TOLERANCE = 2.0


def batch_moments(inputs, *, axis, mask=None, synchronized=False):
    """Mean, biased variance and count of each channel.

    Args:
        inputs: floating tensor of any rank from 2.
        axis: the channels' dimension, in `[0, rank)`.
        mask: None or boolean, of the rank of `inputs` and broadcastable to
            it; positions that are False do not count.
        synchronized: not supported.

    Returns:
        `(mean, variance, count)`, float32, or float64 for float64 inputs;
        `mean` and `variance` of shape `(channels,)`, `count` an int, or of
        shape `(channels,)` under a mask. No gradient flows through them.
    """
    _refuse_synchronized(synchronized)
    inputs = lax.stop_gradient(inputs)
    count = _count(inputs, mask, axis)
    mean, variance = _moments(inputs, count, mask, axis)
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
    """Normalizes each channel with the moments of this batch.

    Args:
        inputs: floating tensor of any rank from 2.
        gamma, beta: None or of shape `(channels,)`.
        axis, mask, synchronized: as in `batch_moments`.
        epsilon: added to the variance.
        moments: None, or what `batch_moments` returned for these inputs and
            this mask.

    Returns:
        `(outputs, mean, variance, count)`: `outputs` like `inputs`, the rest
        as from `batch_moments`. Gradients flow from `outputs` to `gamma`,
        `beta` and, through the moments too, to `inputs`; from `mean` and
        `variance`, which JAX users get back as the new state, to `inputs`.
    """
    _refuse_synchronized(synchronized)
    if moments is None:
        moments = batch_moments(inputs, axis=axis, mask=mask)
    mean, variance = map(lax.stop_gradient, moments[:2])
    count = moments[2]
    # Inside `shard_map` devices share parameters, but not their gradients:
    # here they meet what the devices do not share, which JAX differentiates.
    if gamma is not None:
        gamma = jnp.where(True, gamma, mean)
    if beta is not None:
        beta = jnp.where(True, beta, mean)
    outputs = _normalize_batch(
        inputs,
        gamma,
        beta,
        mean,
        variance,
        jnp.asarray(count, mean.dtype),
        mask,
        axis,
        epsilon,
    )
    mean, variance = _as_moments_of(
        inputs, mean, variance, jnp.asarray(count, mean.dtype), mask, axis
    )
    return outputs, mean, variance, count


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """Normalizes each channel with moments that do not depend on `inputs`.

    Args:
        inputs: floating tensor of any rank from 2.
        mean, variance: of shape `(channels,)`.
        gamma, beta: None or of shape `(channels,)`.
        axis: the channels' dimension, in `[0, rank)`.
        epsilon: added to the variance.

    Returns:
        `gamma * (inputs - mean) / sqrt(variance + epsilon) + beta`, of the
        shape and dtype of `inputs`, computed in float32 or wider.
    """
    # A multiplication and an addition; one operation more can be seen in the
    # time of small channels.
    factor = _factor(variance, gamma, epsilon)
    offset = -mean * factor if beta is None else beta - mean * factor
    outputs = inputs.astype(mean.dtype) * _along(axis, factor, inputs.ndim)
    outputs = outputs + _along(axis, offset, inputs.ndim)
    return outputs.astype(inputs.dtype)


def _refuse_synchronized(synchronized):
    if synchronized:
        raise ValueError(
            "The JAX kernels do not support synchronized moments. "
            f"Received: synchronized={synchronized}"
        )


def _along(axis, vector, rank):
    """`vector` of shape `(channels,)`, or a scalar, to be met by inputs."""
    return jnp.expand_dims(
        jnp.atleast_1d(vector), [i for i in range(rank) if i != axis]
    )


def _factor(variance, gamma, epsilon):
    """`gamma / sqrt(variance + epsilon)`."""
    factor = lax.rsqrt(variance + epsilon)
    return factor if gamma is None else factor * gamma


def _normalized(inputs, mean, variance, gamma, beta, axis, epsilon):
    """`(inputs - mean) * factor + beta`, in this form for a large mean.

    `inputs * factor + (beta - mean * factor)` would be the difference of two
    large numbers.
    """
    factor = _factor(variance, gamma, epsilon)
    outputs = _deviation(inputs, mean, axis) * _along(axis, factor, inputs.ndim)
    if beta is not None:
        outputs = outputs + _along(axis, beta, inputs.ndim)
    return outputs.astype(inputs.dtype)


def _deviation(inputs, center, axis):
    return inputs.astype(center.dtype) - _along(axis, center, inputs.ndim)


def _moments_dtype(inputs):
    return jnp.promote_types(inputs.dtype, jnp.float32)


def _reduced(inputs, axis):
    return [i for i in range(inputs.ndim) if i != axis]


# The moments.


def _count(inputs, mask, axis):
    """How many positions enter: an int, or `(channels,)` under a mask."""
    reduced = _reduced(inputs, axis)
    if mask is None:
        count = math.prod(inputs.shape[i] for i in reduced)
        # A size that an exported program leaves open is no int.
        known = isinstance(count, int)
        return count if known else jnp.asarray(count, _moments_dtype(inputs))
    repeats = math.prod(
        inputs.shape[i] for i in reduced if mask.shape[i] != inputs.shape[i]
    )
    count = (
        jnp.sum(mask, reduced, dtype=jnp.int32).astype(_moments_dtype(inputs))
        * repeats
    )
    return jnp.broadcast_to(count, (inputs.shape[axis],))


def _moments(inputs, count, mask, axis):
    """Mean and biased variance by at most two passes of shifted sums."""
    if inputs.size == 0:
        zeros = jnp.zeros((inputs.shape[axis],), _moments_dtype(inputs))
        return zeros, zeros
    divisor = jnp.maximum(count, 1)

    def around(shift):
        deviation = _deviation(inputs, shift, axis)
        if mask is not None:
            deviation = jnp.where(mask, deviation, 0)
        first, second = _paired_sums(deviation, jnp.square(deviation), axis)
        offset = first / divisor
        variance = jnp.maximum(second / divisor - jnp.square(offset), 0)
        mean = jnp.where(count > 0, shift + offset, 0)
        return mean, variance, offset

    mean, variance, offset = around(_shift(inputs, mask, axis))
    shift_is_far = jnp.square(offset) > _SHIFT_TOLERANCE**2 * variance
    # The mean of equal elements may be off by rounding, and so may the shift.
    rounding = 8 * jnp.finfo(mean.dtype).eps * jnp.abs(mean)
    shift_is_far &= jnp.abs(offset) > rounding
    return lax.cond(
        jnp.any(shift_is_far),
        lambda: around(jnp.where(jnp.isfinite(mean), mean, 0))[:2],
        lambda: (mean, variance),
    )


def _is_of_known_shape(inputs):
    return all(isinstance(size, int) for size in inputs.shape)


def _shift(inputs, mask, axis):
    """Mean of a few elements of each channel, or 0 where that is as good."""
    if not _is_of_known_shape(inputs):
        return jnp.zeros((inputs.shape[axis],), _moments_dtype(inputs))
    wanted = _SHIFT_SAMPLES
    picked = [slice(None)] * inputs.ndim
    for i in _reduced(inputs, axis):
        size = inputs.shape[i]
        taken = min(size, wanted)
        step = size // taken
        start = step // 2
        picked[i] = slice(start, start + (taken - 1) * step + 1, step)
        wanted = math.ceil(wanted / taken)
    sample = inputs[tuple(picked)].astype(_moments_dtype(inputs))
    entered = jnp.broadcast_to(True if mask is None else mask, inputs.shape)
    entered = entered[tuple(picked)]
    reduced = _reduced(inputs, axis)
    divisor = jnp.maximum(jnp.sum(entered, reduced, dtype=sample.dtype), 1)

    def average(values):
        return jnp.sum(jnp.where(entered, values, 0), reduced) / divisor

    center = average(sample)
    spread = average(jnp.abs(_deviation(sample, center, axis)))
    # Centered data is summed best as it is, and so is what is not finite.
    return jnp.where(jnp.abs(center) > spread, center, 0)


def _paired_sums(first, second, axis):
    """Sums of two tensors of one shape over all dimensions but `axis`.

    Both in one loop over memory; two calls of `jnp.sum` are two loops, and
    write down what they share.
    """
    shape = first.shape
    if not _is_of_known_shape(first):
        reduced = _reduced(first, axis)
        return [jnp.sum(x, reduced) for x in (first, second)]
    # The first dimension is left whole where possible: it is the one that a
    # sharded batch is cut along, and XLA gathers what it is told to reduce
    # so along a sharded dimension.
    grouped = [
        shape[0] if axis > 0 else 1,
        math.prod(shape[1:axis]),
        shape[axis],
        math.prod(shape[axis + 1 :]),
    ]
    long_enough = [i for i in (1, 3) if grouped[i] >= max(_SLICES)]
    cut = long_enough[0] if long_enough else 0
    length = grouped[cut]
    slices = min(_SLICES, key=lambda k: (length % k, abs(k - 8)))
    even = length - length % slices
    # Of the first dimension adjacent rows are added up, so that it stays
    # sharded; of another one, distant slices, to have long inner loops.
    pieces = [even // slices, slices] if cut == 0 else [slices, even // slices]
    split = grouped[:cut] + pieces + grouped[cut + 1 :]
    pair = [x.reshape(grouped) for x in (first, second)]
    body = [lax.slice_in_dim(x, 0, even, axis=cut) for x in pair]
    zero = jnp.zeros((), first.dtype)
    body = lax.reduce(
        [x.reshape(split) for x in body],
        [zero, zero],
        lambda x, y: [x[0] + y[0], x[1] + y[1]],
        [1 if cut == 0 else cut],
    )
    sums = [jnp.sum(x, (0, 1, 3)) for x in body]
    if even < length:
        rest = [lax.slice_in_dim(x, even, length, axis=cut) for x in pair]
        sums = [s + jnp.sum(x, (0, 1, 3)) for s, x in zip(sums, rest)]
    return sums


# The training road: what is saved for the backward pass is the inputs, the
# mask and vectors.


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _normalize_batch(
    inputs, gamma, beta, mean, variance, count, mask, axis, epsilon
):
    return _normalized(inputs, mean, variance, gamma, beta, axis, epsilon)


def _normalize_batch_forward(
    inputs, gamma, beta, mean, variance, count, mask, axis, epsilon
):
    mean, variance = _as_moments_of(inputs, mean, variance, count, mask, axis)
    outputs = _normalized(inputs, mean, variance, gamma, beta, axis, epsilon)
    inverse = lax.rsqrt(variance + epsilon)
    beta_like = None if beta is None else beta[:0]
    residuals = inputs, gamma, beta_like, mean, inverse, count, mask
    return outputs, residuals


def _normalize_batch_backward(axis, epsilon, residuals, output_gradient):
    inputs, gamma, beta_like, mean, inverse, count, mask = residuals
    gradient_sum, projection = _gradient_sums(
        output_gradient, inputs, mean, mask, axis
    )
    projection = projection * inverse
    divisor = jnp.maximum(count, 1)
    factor = inverse if gamma is None else gamma * inverse
    constant = gradient_sum / divisor
    slope = projection * inverse / divisor

    through_moments = _deviation(inputs, mean, axis) * _along(
        axis, slope, inputs.ndim
    ) + _along(axis, constant, inputs.ndim)
    if mask is not None:
        through_moments = jnp.where(mask, through_moments, 0)
    input_gradient = (
        output_gradient.astype(mean.dtype) - through_moments
    ) * _along(axis, factor, inputs.ndim)
    return (
        input_gradient.astype(inputs.dtype),
        None if gamma is None else projection.astype(gamma.dtype),
        None if beta_like is None else gradient_sum.astype(beta_like.dtype),
        None,
        None,
        None,
        None,
    )


_normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gradient_sums(output_gradient, inputs, mean, mask, axis):
    """Per channel, sums of the gradient and of gradient * deviation."""
    gradient = output_gradient.astype(mean.dtype)
    deviation = _counted_deviation(inputs, mean, mask, axis)
    return _paired_sums(gradient, gradient * deviation, axis)


def _counted_deviation(inputs, mean, mask, axis):
    deviation = _deviation(inputs, mean, axis)
    if mask is None:
        return deviation
    # A NaN or infinity under the mask would make NaN of a gradient of 0.
    return jnp.where(mask | jnp.isfinite(deviation), deviation, 0)


def _gradient_sums_forward(output_gradient, inputs, mean, mask, axis):
    sums = _gradient_sums(output_gradient, inputs, mean, mask, axis)
    return sums, (output_gradient, inputs, mean, mask, sums[0])


def _gradient_sums_backward(axis, residuals, cotangents):
    output_gradient, inputs, mean, mask, gradient_sum = residuals
    of_sum, of_projection = (_along(axis, c, inputs.ndim) for c in cotangents)
    deviation = _counted_deviation(inputs, mean, mask, axis)
    to_gradient = of_sum + of_projection * deviation
    to_inputs = of_projection * output_gradient.astype(mean.dtype)
    return (
        to_gradient.astype(output_gradient.dtype),
        to_inputs.astype(inputs.dtype),
        -cotangents[1] * gradient_sum,
        None,
    )


_gradient_sums.defvjp(_gradient_sums_forward, _gradient_sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _as_moments_of(inputs, mean, variance, count, mask, axis):
    """`mean` and `variance`, with the derivatives of the inputs' moments.

    Only derivatives of the backward pass come through here.
    """
    return mean, variance


def _as_moments_of_forward(inputs, mean, variance, count, mask, axis):
    moments = _as_moments_of(inputs, mean, variance, count, mask, axis)
    return moments, (inputs, moments[0], count, mask)


def _as_moments_of_backward(axis, residuals, cotangents):
    inputs, mean, count, mask = residuals
    divisor = jnp.maximum(count, 1)
    of_mean, of_variance = (
        _along(axis, c / divisor, inputs.ndim) for c in cotangents
    )
    to_inputs = of_mean + 2 * of_variance * _deviation(inputs, mean, axis)
    if mask is not None:
        to_inputs = jnp.where(mask, to_inputs, 0)
    return to_inputs.astype(inputs.dtype), None, None, None, None


_as_moments_of.defvjp(_as_moments_of_forward, _as_moments_of_backward)

"""The moments of a batch in one pass that stays exact at large means.

Each channel is shifted by the mean of a few of its own elements, and one pass
over the inputs sums the deviations `d` from that shift and their squares (Chan,
Golub & LeVeque, 1983, "Algorithms for computing the sample variance", section
3):

    mean     = shift + sum(d) / count
    variance = sum(d**2) / count - (sum(d) / count)**2

The difference in the second line loses digits only where the shift is several
deviations away from the mean. The result itself tells when that happened, and
then a second pass is made with the first one's mean as the shift.

How the sums are laid out. `paired_sums` adds up a few slices of the inputs
element by element, both sums in one loop over memory, and leaves the small
result to ordinary reductions. XLA compiles a reduction of a short dimension to
a vectorized loop, and the two levels of summation keep the rounding error of
long sums low.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from keras_bn.kernels.jax.views import deviation_from
from keras_bn.kernels.jax.views import is_of_known_shape
from keras_bn.kernels.jax.views import moments_dtype
from keras_bn.kernels.jax.views import reduced_axes

# Into how many slices `paired_sums` may cut; few enough to be unrolled.
_SLICES = range(4, 17)
_SHIFT_SAMPLES = 16
# A shift `k` deviations off costs a factor `1 + k**2` in the error of the
# variance.
_SHIFT_TOLERANCE = 2.0


def count_positions(inputs, mask, axis):
    """How many positions enter: an int, or `(channels,)` under a mask."""
    reduced = reduced_axes(inputs, axis)
    if mask is None:
        count = math.prod(inputs.shape[i] for i in reduced)
        # A size that an exported program leaves open is no int.
        known = isinstance(count, int)
        return count if known else jnp.asarray(count, moments_dtype(inputs))
    repeats = math.prod(
        inputs.shape[i] for i in reduced if mask.shape[i] != inputs.shape[i]
    )
    count = (
        jnp.sum(mask, reduced, dtype=jnp.int32).astype(moments_dtype(inputs))
        * repeats
    )
    return jnp.broadcast_to(count, (inputs.shape[axis],))


def moments_of(inputs, mask, axis):
    """Mean and biased variance by at most two passes of shifted sums."""
    if inputs.size == 0:
        zeros = jnp.zeros((inputs.shape[axis],), moments_dtype(inputs))
        return zeros, zeros

    def around(shift):
        return _moments_around(shift, inputs, mask, axis)

    return _again_if_far(around, _shift(inputs, mask, axis))


def moments_of_parts(parts, mask, axis):
    """The moments of each of `parts`, stacked along a new first dimension.

    `mask` has that dimension too, unless it is the same for all. One question
    is asked for all parts: mapped over, a condition takes both of its ways.
    """
    of_mask = 0 if mask is not None and mask.ndim == parts.ndim else None

    def of_each(function, *shift):
        def of_part(part, mask, *shift):
            return function(*shift, part, mask, axis)

        in_axes = (0, of_mask, *[0] * len(shift))
        return jax.vmap(of_part, in_axes)(parts, mask, *shift)

    def around(shift):
        return of_each(_moments_around, shift)

    return _again_if_far(around, of_each(_shift))


def _again_if_far(around, shift):
    mean, variance, offset = around(shift)
    shift_is_far = jnp.square(offset) > _SHIFT_TOLERANCE**2 * variance
    # The mean of equal elements may be off by rounding, and so may the shift.
    rounding = 8 * jnp.finfo(mean.dtype).eps * jnp.abs(mean)
    shift_is_far &= jnp.abs(offset) > rounding
    return lax.cond(
        jnp.any(shift_is_far),
        lambda: around(jnp.where(jnp.isfinite(mean), mean, 0))[:2],
        lambda: (mean, variance),
    )


def _moments_around(shift, inputs, mask, axis):
    """Mean and variance, and how far the mean is from the shift."""
    count = count_positions(inputs, mask, axis)
    # An int is no constant of a condition's ways: inside `shard_map` one that
    # all devices share cannot be mapped over.
    known = isinstance(count, int)
    divisor = max(count, 1) if known else jnp.maximum(count, 1)
    deviation = deviation_from(inputs, shift, axis)
    if mask is not None:
        deviation = jnp.where(mask, deviation, 0)
    first, second = paired_sums(deviation, jnp.square(deviation), axis)
    offset = first / divisor
    variance = jnp.maximum(second / divisor - jnp.square(offset), 0)
    mean = jnp.where(count > 0, shift + offset, 0)
    return mean, variance, offset


def _shift(inputs, mask, axis):
    """Mean of a few elements of each channel, or 0 where that is as good."""
    if not is_of_known_shape(inputs):
        return jnp.zeros((inputs.shape[axis],), moments_dtype(inputs))
    wanted = _SHIFT_SAMPLES
    picked = [slice(None)] * inputs.ndim
    for i in reduced_axes(inputs, axis):
        size = inputs.shape[i]
        taken = min(size, wanted)
        step = size // taken
        start = step // 2
        picked[i] = slice(start, start + (taken - 1) * step + 1, step)
        wanted = math.ceil(wanted / taken)
    sample = inputs[tuple(picked)].astype(moments_dtype(inputs))
    entered = jnp.broadcast_to(True if mask is None else mask, inputs.shape)
    entered = entered[tuple(picked)]
    reduced = reduced_axes(inputs, axis)
    divisor = jnp.maximum(jnp.sum(entered, reduced, dtype=sample.dtype), 1)

    def average(values):
        return jnp.sum(jnp.where(entered, values, 0), reduced) / divisor

    center = average(sample)
    spread = average(jnp.abs(deviation_from(sample, center, axis)))
    # Centered data is summed best as it is, and so is what is not finite.
    return jnp.where(jnp.abs(center) > spread, center, 0)


def paired_sums(first, second, axis):
    """Sums of two tensors of one shape over all dimensions but `axis`.

    Both in one loop over memory; two calls of `jnp.sum` are two loops, and
    write down what they share.
    """
    shape = first.shape
    if not is_of_known_shape(first):
        reduced = reduced_axes(first, axis)
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

"""The training road: normalization whose derivatives are written out.

They are written as forward mode has them: what changes in the result as the
arguments change, a linear map. JAX turns it around for reverse mode. Left to
itself JAX would keep the deviations from the mean for that, and sum over them
twice; so the one large step of the map, `_spread`, says itself what its inverse
direction is, `_sums`, and the other way round. What is saved is the inputs, the
mask and vectors.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_bn.kernels.jax.moments import paired_sums
from keras_bn.kernels.jax.views import along
from keras_bn.kernels.jax.views import deviation_from
from keras_bn.kernels.jax.views import normalized
from keras_bn.kernels.jax.views import reduced_axes
from keras_bn.kernels.jax.views import scale_factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def as_moments_of(inputs, mean, variance, count, mask, axis, replicas):
    """`mean` and `variance`, with the derivatives of the inputs' moments.

    With `replicas` they are the moments of all replicas' inputs.
    """
    return mean, variance


@as_moments_of.defjvp
def _as_moments_of_jvp(axis, replicas, primals, tangents):
    inputs, mean, variance, count, mask = primals
    mean, variance = as_moments_of(
        inputs, mean, variance, count, mask, axis, replicas
    )
    center = replicas.varying(mean) if replicas else mean
    change = tangents[0].astype(mean.dtype)
    sums = _sums(change, inputs, center, mask, axis)
    if replicas:
        sums = replicas.total(sums)
    of_mean, half = sums * (1 / jnp.maximum(count, 1))
    return (mean, variance), (of_mean, half + half)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def normalize_with_moments(
    inputs, gamma, beta, mean, variance, mask, axis, epsilon, replicas
):
    """Normalizes `inputs` with moments from `as_moments_of`."""
    return normalized(inputs, mean, variance, gamma, beta, axis, epsilon)


@normalize_with_moments.defjvp
def _normalize_jvp(axis, epsilon, replicas, primals, tangents):
    inputs, gamma, beta, mean, variance, mask = primals
    of_inputs, of_gamma, of_beta, of_mean, of_variance, _ = tangents
    inverse = lax.rsqrt(variance + epsilon)
    factor = scale_factor(variance, gamma, epsilon)
    offset = of_mean * -factor
    slope = of_variance * (factor * jnp.square(inverse) / -2)
    if gamma is not None:
        slope = slope + of_gamma * inverse
    if beta is not None:
        offset = offset + of_beta
    coefficients = jnp.stack([offset, slope])
    if replicas:
        mean, coefficients = map(replicas.varying, (mean, coefficients))
    change = of_inputs.astype(mean.dtype) * along(axis, factor, inputs.ndim)
    change = change + _spread(coefficients, inputs, mean, mask, axis)
    outputs = normalize_with_moments(*primals, axis, epsilon, replicas)
    return outputs, change.astype(inputs.dtype)


def _spread(coefficients, inputs, mean, mask, axis):
    """`offset + slope * deviation`, from both, stacked; linear in them."""
    # All that `custom_linear_solve` is given has to depend on what is linear.
    zero = jnp.broadcast_to(jnp.sum(coefficients[:0]), inputs.shape)
    forth, _, by_spread, by_sums = _equations(inputs, mean, mask, None, axis)
    return lax.custom_linear_solve(
        forth, (zero, coefficients), by_spread, by_sums
    )[0]


def _sums(change, inputs, mean, mask, axis):
    """Per channel, sums of `change` and of `change * deviation`, stacked.

    Of what the mask keeps.
    """
    reduced = reduced_axes(inputs, axis)
    nothing = lax.slice_in_dim(change, 0, 0, axis=reduced[0])
    zero = jnp.stack([jnp.sum(nothing, reduced)] * 2)
    _, back, by_spread, by_sums = _equations(inputs, mean, mask, mask, axis)
    return lax.custom_linear_solve(back, (change, zero), by_sums, by_spread)[1]


def _equations(inputs, mean, mask, kept, axis):
    """`_spread` and `_sums` as the solutions of linear equations.

    `jax.lax.custom_linear_solve` is JAX's public way to a linear function with
    a transpose of one's own that has derivatives of any order in either mode.
    With S for the spread, the equations `x - S(y) = a, y = b` are solved by
    `x = a + S(b), y = b`, and their transposes by the sums. Derivatives by
    `inputs` and `mean` are taken of the equations, which plain operations state.

    Args:
        inputs, mean, mask, axis: as in `_spread`.
        kept: None, or the mask outside of which the spread is 0.

    Returns:
        The equations of the spread, those of the sums, and how each is solved.
    """

    def deviation():
        deviation = deviation_from(inputs, mean, axis)
        if mask is None:
            return deviation
        # A NaN or infinity under the mask would make NaN of a change of 0.
        return jnp.where(mask | jnp.isfinite(deviation), deviation, 0)

    def spread(coefficients):
        offset, slope = (along(axis, c, inputs.ndim) for c in coefficients)
        change = offset + slope * deviation()
        return change if kept is None else jnp.where(kept, change, 0)

    def pair(change):
        if kept is not None:
            change = jnp.where(kept, change, 0)
        return change, change * deviation()

    def plain_sums(change):
        reduced = reduced_axes(inputs, axis)
        return jnp.stack([jnp.sum(x, reduced) for x in pair(change)])

    # What turns these around is not to keep the deviation for it.
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)

    def forth(unknown):
        return unknown[0] - checkpoint(spread)(unknown[1]), unknown[1]

    def back(unknown):
        return unknown[0], unknown[1] - checkpoint(plain_sums)(unknown[0])

    def by_spread(_, known):
        return known[0] + spread(known[1]), known[1]

    def by_sums(_, known):
        sums = paired_sums(*pair(known[0]), axis)
        return known[0], known[1] + jnp.stack(sums)

    return forth, back, by_spread, by_sums

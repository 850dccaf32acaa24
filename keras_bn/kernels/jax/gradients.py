"""The training road: normalization whose derivatives are written out.

They are written as forward mode has them: how the results change as the
arguments do, a linear map. JAX turns it around for reverse mode, with the help
of `linear_maps`; what is saved for it is the inputs, the mask and vectors.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_bn.kernels.jax import linear_maps
from keras_bn.kernels.jax.views import along
from keras_bn.kernels.jax.views import normalized
from keras_bn.kernels.jax.views import scale_factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8, 9))
def normalize_with_moments(
    inputs, gamma, beta, mean, variance, count, mask, axis, epsilon, replicas
):
    """Normalizes `inputs` with their own moments, taken beforehand.

    With `replicas` they are the moments of all replicas' inputs.

    Returns:
        The outputs, and `mean` and `variance` as functions of `inputs`.
    """
    outputs = normalized(inputs, mean, variance, gamma, beta, axis, epsilon)
    return outputs, mean, variance


@normalize_with_moments.defjvp
def _normalize_jvp(axis, epsilon, replicas, primals, tangents):
    inputs, gamma, beta, _, _, count, mask = primals
    of_inputs, of_gamma, of_beta, *_ = tangents
    # The moments that come back have derivatives, those that went in do not.
    results = normalize_with_moments(*primals, axis, epsilon, replicas)
    _, mean, variance = results
    inverse = lax.rsqrt(variance + epsilon)
    factor = scale_factor(variance, gamma, epsilon)
    center = replicas.varying(mean) if replicas else mean

    change = of_inputs.astype(mean.dtype)
    sums = linear_maps.sums(
        change, inputs, center, mask, axis=axis, confined=True
    )
    if replicas:
        sums = replicas.total(jnp.stack(sums))
    share = 1 / jnp.maximum(count, 1)
    of_mean, half_of_variance = (s * share for s in sums)

    offset = -of_mean * factor
    slope = half_of_variance * (-factor * jnp.square(inverse))
    if gamma is not None:
        slope = slope + of_gamma * inverse
    if beta is not None:
        offset = offset + of_beta
    coefficients = offset, slope
    if replicas:
        # Stacked, so that reverse mode sends them at once.
        coefficients = tuple(replicas.varying(jnp.stack(coefficients)))
    of_outputs = change * along(axis, factor, inputs.ndim)
    of_outputs = of_outputs + linear_maps.spread(
        *coefficients, inputs, center, mask, axis=axis
    )
    of_variance = half_of_variance + half_of_variance
    return results, (of_outputs.astype(inputs.dtype), of_mean, of_variance)

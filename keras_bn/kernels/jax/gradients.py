"""The training road: normalization whose backward pass is written out.

What is saved for it is the inputs, the mask and vectors.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_bn.kernels.jax.moments import paired_sums
from keras_bn.kernels.jax.views import along
from keras_bn.kernels.jax.views import deviation_from
from keras_bn.kernels.jax.views import normalized


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def normalize_with_moments(
    inputs, gamma, beta, mean, variance, count, mask, axis, epsilon, replicas
):
    """Normalizes `inputs` with their own moments, taken beforehand.

    With `replicas` they are the moments of all replicas' inputs.
    """
    return normalized(inputs, mean, variance, gamma, beta, axis, epsilon)


def _normalize_forward(
    inputs, gamma, beta, mean, variance, count, mask, axis, epsilon, replicas
):
    mean, variance = as_moments_of(
        inputs, mean, variance, count, mask, axis, replicas
    )
    outputs = normalized(inputs, mean, variance, gamma, beta, axis, epsilon)
    inverse = lax.rsqrt(variance + epsilon)
    residuals = inputs, gamma, beta, mean, inverse, count, mask
    return outputs, residuals


def _normalize_backward(axis, epsilon, replicas, residuals, output_gradient):
    inputs, gamma, beta, mean, inverse, count, mask = residuals
    center = replicas.varying(mean) if replicas else mean
    sums = own = _gradient_sums(output_gradient, inputs, center, mask, axis)
    if replicas:
        sums = replicas.total(jnp.stack(own))

    def gradient_of(vector, which):
        """A parameter's: of this replica, unless JAX wants that of all."""
        if vector is None:
            return None
        of_all = replicas and replicas.is_shared(vector)
        gradient = (sums if of_all else own)[which]
        return (gradient * inverse if which else gradient).astype(vector.dtype)

    gradient_sum, projection = sums[0], sums[1] * inverse
    divisor = jnp.maximum(count, 1)
    factor = inverse if gamma is None else gamma * inverse
    constant = gradient_sum / divisor
    slope = projection * inverse / divisor

    through_moments = deviation_from(inputs, mean, axis) * along(
        axis, slope, inputs.ndim
    ) + along(axis, constant, inputs.ndim)
    if mask is not None:
        through_moments = jnp.where(mask, through_moments, 0)
    input_gradient = (
        output_gradient.astype(mean.dtype) - through_moments
    ) * along(axis, factor, inputs.ndim)
    return (
        input_gradient.astype(inputs.dtype),
        gradient_of(gamma, 1),
        gradient_of(beta, 0),
        None,
        None,
        None,
        None,
    )


normalize_with_moments.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gradient_sums(output_gradient, inputs, mean, mask, axis):
    """Per channel, sums of the gradient and of gradient * deviation."""
    gradient = output_gradient.astype(mean.dtype)
    deviation = _counted_deviation(inputs, mean, mask, axis)
    return paired_sums(gradient, gradient * deviation, axis)


def _counted_deviation(inputs, mean, mask, axis):
    deviation = deviation_from(inputs, mean, axis)
    if mask is None:
        return deviation
    # A NaN or infinity under the mask would make NaN of a gradient of 0.
    return jnp.where(mask | jnp.isfinite(deviation), deviation, 0)


def _gradient_sums_forward(output_gradient, inputs, mean, mask, axis):
    sums = _gradient_sums(output_gradient, inputs, mean, mask, axis)
    return sums, (output_gradient, inputs, mean, mask, sums[0])


def _gradient_sums_backward(axis, residuals, cotangents):
    output_gradient, inputs, mean, mask, gradient_sum = residuals
    of_sum, of_projection = (along(axis, c, inputs.ndim) for c in cotangents)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def as_moments_of(inputs, mean, variance, count, mask, axis, replicas):
    """`mean` and `variance`, with the derivatives of the inputs' moments.

    Only derivatives of the backward pass come through here.
    """
    return mean, variance


def _as_moments_of_forward(
    inputs, mean, variance, count, mask, axis, replicas
):
    moments = as_moments_of(
        inputs, mean, variance, count, mask, axis, replicas
    )
    return moments, (inputs, moments[0], count, mask)


def _as_moments_of_backward(axis, replicas, residuals, cotangents):
    inputs, mean, count, mask = residuals
    if replicas:
        cotangents = map(replicas.total_of_parts, cotangents)
    divisor = jnp.maximum(count, 1)
    of_mean, of_variance = (
        along(axis, c / divisor, inputs.ndim) for c in cotangents
    )
    to_inputs = of_mean + 2 * of_variance * deviation_from(inputs, mean, axis)
    if mask is not None:
        to_inputs = jnp.where(mask, to_inputs, 0)
    return to_inputs.astype(inputs.dtype), None, None, None, None


as_moments_of.defvjp(_as_moments_of_forward, _as_moments_of_backward)

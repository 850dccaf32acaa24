"""How the JAX kernels see a tensor of any rank and channel axis."""

import jax.numpy as jnp
from jax import lax


def along(axis, vector, rank):
    """`vector` of shape `(channels,)`, or a scalar, to be met by inputs."""
    return jnp.expand_dims(
        jnp.atleast_1d(vector), [i for i in range(rank) if i != axis]
    )


def reduced_axes(inputs, axis):
    return [i for i in range(inputs.ndim) if i != axis]


def moments_dtype(inputs):
    return jnp.promote_types(inputs.dtype, jnp.float32)


def is_of_known_shape(inputs):
    return all(isinstance(size, int) for size in inputs.shape)


def deviation_from(inputs, center, axis):
    return inputs.astype(center.dtype) - along(axis, center, inputs.ndim)


def scale_factor(variance, gamma, epsilon):
    """`gamma / sqrt(variance + epsilon)`."""
    factor = lax.rsqrt(variance + epsilon)
    return factor if gamma is None else factor * gamma


def normalized(inputs, mean, variance, gamma, beta, axis, epsilon):
    """`(inputs - mean) * factor + beta`, in this form for a large mean.

    `inputs * factor + (beta - mean * factor)` would be the difference of two
    large numbers.
    """
    factor = scale_factor(variance, gamma, epsilon)
    outputs = deviation_from(inputs, mean, axis) * along(
        axis, factor, inputs.ndim
    )
    if beta is not None:
        outputs = outputs + along(axis, beta, inputs.ndim)
    return outputs.astype(inputs.dtype)

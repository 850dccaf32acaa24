"""Batch normalization in plain PyTorch operations.

On the shape of the inputs: for any device, traceable, and differentiable
again.
"""

import torch

from keras_bn.kernels.torch.views import along


def moments(inputs, axis, mask, replicas=None):
    """`(mean, variance, count)` of the positions that count."""
    dtype = moments_dtype(inputs.dtype)
    reduced = [i for i in range(inputs.dim()) if i != axis]
    x = inputs.to(dtype)
    if mask is None:
        count = x.numel() // max(x.shape[axis], 1)
        if isinstance(count, torch.SymInt):
            count = torch.scalar_tensor(count, dtype=dtype)
    else:
        count = mask.expand_as(x).sum(reduced).to(dtype)
        x = torch.where(mask, x, 0.0)
    total = torch.Tensor.sum
    if replicas is not None:
        count = replicas.total(filled(count, like=x))

        def total(x, reduced):
            return replicas.total(x.sum(reduced))

    divisor = at_least_one(count)
    mean = total(x, reduced) / divisor
    deviation = x - along(axis, mean, x)
    if mask is not None:
        deviation = torch.where(mask, deviation, 0.0)
    return mean, total(deviation.square(), reduced) / divisor, count


def outputs(inputs, gamma, beta, mean, variance, axis, epsilon):
    """Normalized inputs, in their dtype."""
    factor = scale_factor(gamma, variance, epsilon)
    outputs = (inputs - along(axis, mean, inputs)) * along(axis, factor, inputs)
    if beta is not None:
        outputs = outputs + along(axis, beta, inputs)
    return outputs.to(inputs.dtype)


def input_gradient(dy, gamma, variance, axis, epsilon):
    """Of the inputs, where nothing else depends on them."""
    factor = along(axis, scale_factor(gamma, variance, epsilon), dy)
    return (dy * factor).to(dy.dtype)


def gradients(
    dy,
    inputs,
    gamma,
    mean,
    variance,
    count,
    mask,
    axis,
    epsilon,
    replicas=None,
):
    """Of inputs, gamma and beta; through the moments where there is a count.

    With `replicas` these are the moments of all; the gradients of gamma and
    beta are those of this one.
    """
    if count is not None and torch.is_grad_enabled():
        mean, variance, _ = moments(inputs, axis, mask, replicas)
    reduced = [i for i in range(inputs.dim()) if i != axis]
    normalized = standardized(
        inputs,
        along(axis, mean, inputs),
        along(axis, (variance + epsilon).rsqrt(), inputs),
        mask,
    )
    dx = dy = dy.to(mean.dtype)
    gamma_gradient = (dy * normalized).sum(reduced)
    beta_gradient = dy.sum(reduced)
    if count is not None:
        # In the order of the native kernels: a replica without samples, which
        # takes this way, meets those that have some.
        sums = torch.stack([gamma_gradient, beta_gradient])
        if replicas is not None:
            sums = replicas.total(sums)
        slope, shift = sums / at_least_one(count)
        through_moments = along(axis, shift, inputs)
        through_moments = through_moments + normalized * along(
            axis, slope, inputs
        )
        if mask is not None:
            through_moments = torch.where(mask, through_moments, 0.0)
        dx = dy - through_moments
    dx = dx * along(axis, scale_factor(gamma, variance, epsilon), inputs)
    return dx.to(inputs.dtype), gamma_gradient, beta_gradient


def gradients_of_constants(
    gamma_gradient, beta_gradient, gamma, variance, epsilon
):
    """Of a mean and a variance that do not depend on the inputs."""
    inverse = (variance + epsilon).rsqrt()
    factor = inverse if gamma is None else gamma * inverse
    return -factor * beta_gradient, -0.5 * factor * inverse * gamma_gradient


def standardized(x, mean, inverse, keep):
    """Normalized inputs; those neither finite nor kept count as the mean."""
    deviation = x - mean
    if keep is not None:
        deviation = torch.where(keep | deviation.isfinite(), deviation, 0.0)
    return deviation * inverse


def scale_factor(gamma, variance, epsilon):
    """`gamma / sqrt(variance + epsilon)`."""
    inverse = (variance + epsilon).rsqrt()
    return inverse if gamma is None else gamma * inverse


def at_least_one(count):
    """`count`, or 1 where nothing was counted."""
    return max(count, 1) if isinstance(count, int) else count.clamp(min=1)


def filled(count, like):
    """A count, an int or a tensor, as a tensor of the dtype of `like`.

    An int is written by the device. `torch.as_tensor` copies it there, for
    which a GPU's whole queue is waited for.
    """
    if isinstance(count, torch.Tensor):
        return count.to(like)
    return like.new_full((), count)


def moments_dtype(dtype):
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)

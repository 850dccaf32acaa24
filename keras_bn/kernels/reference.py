"""Batch normalization in float64 NumPy, forward and backward: the definition.

Nothing here is fast and nothing here is used by the layer. The kernels of the
three backends are tested against these functions, and a reader who wants to
know what a kernel means finds it here in a few lines.

The equations are those of Ioffe & Szegedy, 2015 (arXiv 1502.03167), section 3.
The backward pass is written out from them by hand; a mask `w` that is 0 or 1
at each position extends both: only positions with `w = 1` enter the moments,
every position is normalized with them.

Shapes, here and in every kernel: `inputs` of any rank from 2, `gamma`, `beta`,
`mean` and `variance` of shape `(channels,)` where
`channels = inputs.shape[axis]`, `mask` boolean, of the rank of `inputs` and
broadcastable to it.
"""

import numpy as np


def batch_moments(inputs, *, axis, mask=None):
    """Mean and biased variance of each channel over the positions that count.

    Returns:
        `(mean, variance, count)`, each of shape `(channels,)` and float64.
        A channel with no position has mean 0, variance 0, count 0.
    """
    inputs = np.asarray(inputs, np.float64)
    weights = _weights(inputs, mask)
    reduced = _all_but(axis, inputs.ndim)
    count = weights.sum(reduced)
    divisor = np.maximum(count, 1.0)
    mean = np.where(weights > 0, inputs, 0.0).sum(reduced) / divisor
    deviation = inputs - _along(axis, mean, inputs.ndim)
    deviation = np.where(weights > 0, deviation, 0.0)
    variance = np.square(deviation).sum(reduced) / divisor
    return mean, variance, count


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """`gamma * (inputs - mean) / sqrt(variance + epsilon) + beta`, float64."""
    inputs = np.asarray(inputs, np.float64)
    gamma, beta = _defaults(gamma, beta, inputs.shape[axis])
    factor = gamma / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    deviation = inputs - _along(axis, mean, inputs.ndim)
    return deviation * _along(axis, factor, inputs.ndim) + _along(
        axis, beta, inputs.ndim
    )


def normalize_batch(
    inputs, gamma, beta, *, axis, epsilon, mask=None, moments=None
):
    """Normalizes with the moments of the batch itself.

    Returns:
        `(outputs, mean, variance, count)`, float64.
    """
    if moments is None:
        moments = batch_moments(inputs, axis=axis, mask=mask)
    mean, variance, count = moments
    outputs = normalize_with(
        inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
    )
    return outputs, mean, variance, count


def normalize_with_gradient(
    output_gradient, inputs, mean, variance, gamma, *, axis, epsilon
):
    """Gradients of `normalize_with` for `inputs`, `gamma` and `beta`."""
    inputs = np.asarray(inputs, np.float64)
    output_gradient = np.asarray(output_gradient, np.float64)
    gamma, _ = _defaults(gamma, None, inputs.shape[axis])
    inverse = 1.0 / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    normalized = (inputs - _along(axis, mean, inputs.ndim)) * _along(
        axis, inverse, inputs.ndim
    )
    reduced = _all_but(axis, inputs.ndim)
    return (
        output_gradient * _along(axis, gamma * inverse, inputs.ndim),
        (output_gradient * normalized).sum(reduced),
        output_gradient.sum(reduced),
    )


def normalize_batch_gradient(
    output_gradient, inputs, gamma, *, axis, epsilon, mask=None
):
    """Gradients of `normalize_batch` for `inputs`, `gamma` and `beta`.

    The moments are functions of `inputs`, and the gradient goes through them.
    """
    inputs = np.asarray(inputs, np.float64)
    weights = _weights(inputs, mask)
    mean, variance, count = batch_moments(inputs, axis=axis, mask=mask)
    direct, gamma_gradient, beta_gradient = normalize_with_gradient(
        output_gradient,
        inputs,
        mean,
        variance,
        gamma,
        axis=axis,
        epsilon=epsilon,
    )
    gamma, _ = _defaults(gamma, None, inputs.shape[axis])
    inverse = 1.0 / np.sqrt(variance + epsilon)
    normalized = (inputs - _along(axis, mean, inputs.ndim)) * _along(
        axis, inverse, inputs.ndim
    )
    divisor = np.maximum(count, 1.0)
    factor = gamma * inverse / divisor
    through_moments = _along(
        axis, factor * beta_gradient, inputs.ndim
    ) + normalized * _along(axis, factor * gamma_gradient, inputs.ndim)
    input_gradient = direct - np.where(weights > 0, through_moments, 0.0)
    return input_gradient, gamma_gradient, beta_gradient


def _weights(inputs, mask):
    if mask is None:
        return np.ones(inputs.shape)
    return np.broadcast_to(np.asarray(mask, bool), inputs.shape).astype(float)


def _defaults(gamma, beta, channels):
    gamma = np.ones(channels) if gamma is None else np.asarray(gamma, float)
    beta = np.zeros(channels) if beta is None else np.asarray(beta, float)
    return gamma, beta


def _all_but(axis, rank):
    return tuple(i for i in range(rank) if i != axis % rank)


def _along(axis, vector, rank):
    shape = [1] * rank
    shape[axis] = -1
    return np.asarray(vector, np.float64).reshape(shape)

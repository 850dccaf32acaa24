"""Small parts of a batch, all normalized by the same few operations.

A native kernel for each part would cost more in calls than in arithmetic.
Rows are few, so that nothing is lost in adding them, and the mean is
subtracted before anything else, so that it may be large.
"""

import torch

# Rows of a part and its elements, up to which calls are what costs.
_ROWS = 256
_ELEMENTS = 2**16


def stacked(x, rows):
    """`(parts, rows, channels)`; None where that is not worth while.

    Args:
        x: flat, `(parts * rows, channels)` or with an inner dimension.
        rows: of each part.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        return None
    if len(x) % rows or rows > _ROWS or rows * x.shape[1] > _ELEMENTS:
        return None
    return x.view(-1, rows, x.shape[1])


def normalize(x, gamma, beta, epsilon):
    """`(outputs, mean, variance)`, the latter two `(parts, channels)`."""
    mean = _mean(x)
    deviation = x - mean
    variance = _mean(deviation.square())
    factor = (variance + epsilon).rsqrt_()
    if gamma is not None:
        factor = factor.mul_(gamma)
    if beta is None:
        outputs = deviation.mul_(factor)
    else:
        outputs = torch.addcmul(beta, deviation, factor)
    return outputs, mean.squeeze(1), variance.squeeze(1)


def gradients(dy, x, gamma, mean, variance, epsilon):
    """`(dx, gamma_gradient, beta_gradient)`."""
    deviation = x - mean[:, None]
    inverse = (variance[:, None] + epsilon).rsqrt_()
    of_beta = dy.sum(1, keepdim=True)
    of_gamma = (dy * deviation).sum(1, keepdim=True).mul_(inverse)
    factor = inverse if gamma is None else gamma * inverse
    share = factor / -x.shape[1]
    slope = share * inverse * of_gamma
    dx = torch.addcmul(share * of_beta, deviation, slope)
    dx.addcmul_(dy, factor)
    return dx, of_gamma.sum((0, 1)), of_beta.sum((0, 1))


def _mean(x):
    return x.sum(1, keepdim=True).div_(x.shape[1])

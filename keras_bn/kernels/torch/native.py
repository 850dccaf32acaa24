"""PyTorch's native kernels on flattened CPU tensors.

`x` and `dy` are of shape `(outer, channels, inner)`, or `(outer, channels)`
where `inner` would be 1.
"""

import torch

from keras_bn.kernels.torch.plain import at_least_one
from keras_bn.kernels.torch.plain import moments_dtype
from keras_bn.kernels.torch.plain import scale_factor
from keras_bn.kernels.torch.views import FEW
from keras_bn.kernels.torch.views import blocks
from keras_bn.kernels.torch.views import column
from keras_bn.kernels.torch.views import grouped_rows
from keras_bn.kernels.torch.views import reduced_axes

# Far is where mean^2 > _FAR * variance: five bits would be lost.
_FAR = 2.0**10


def moments(x):
    """`mean`, `variance`, `count`, and whether the data is far."""
    mean, variance = merged_moments(x, moments_dtype(x.dtype))
    count = x.numel() // x.shape[1]
    far = is_far(mean, variance)
    if far:
        mean, variance = _moments_about(mean, x, count)
    return mean, variance, count, far


def is_far(mean, variance):
    """Whether some channel's mean is large against its deviation."""
    return bool((mean * mean > _FAR * variance).any())


def merged_moments(x, dtype):
    """Moments of groups of positions, merged to those of all positions."""
    channels = x.shape[1]
    if x.dim() == 2 and x.shape[0] <= FEW:
        return _native_moments(x, dtype)
    means, variances, lengths = [], [], []
    if x.dim() == 2:
        for rows in grouped_rows(x):
            mean, variance = _native_moments(rows, dtype)
            means.append(mean.view(-1, channels))
            variances.append(variance.view(-1, channels))
            lengths += [rows.shape[0]] * means[-1].shape[0]
    else:
        for (block,) in blocks(x):
            length = block.shape[0] * block.shape[2]
            mean = block.sum(2, dtype=dtype).sum(0).div_(length)
            deviation = block - mean[:, None]
            means.append(mean[None])
            variances.append(
                deviation.square_().sum(2).sum(0, True).div_(length)
            )
            lengths.append(length)
    total = sum(lengths)
    weights = [[length / total] for length in lengths]
    weights = torch.tensor(weights, dtype=dtype)
    means = torch.cat(means)
    # No product of matrices: autocast would round it.
    mean = (weights * means).sum(0)
    offsets = means - mean
    variances = torch.cat(variances).addcmul_(offsets, offsets)
    return mean, (weights * variances).sum(0)


def _native_moments(x, dtype):
    # The kernel returns its moments in the dtype of the running ones, or else
    # in that of `x`; with momentum 0 it leaves the running ones alone.
    running = None
    if x.dtype != dtype:
        running = torch.zeros(x.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(x, running, running, 0.0)


def _moments_about(center, x, count):
    """Moments from the deviations from a vector near the mean."""
    first, second = 0.0, 0.0
    for (block,) in blocks(x):
        deviation = block - column(center, x)
        first = first + deviation.sum(reduced_axes(x))
        second = second + deviation.square_().sum(reduced_axes(x))
    return moments_of_sums(center, first, second, count)


def moments_of_sums(center, first, second, count):
    """From the sums of the deviations from a vector and of their squares."""
    divisor = at_least_one(count)
    offset = first / divisor
    variance = second / divisor - offset.square()
    return center + offset, variance.clamp_(min=0)


def outputs(x, gamma, beta, mean, variance, epsilon, far, into=None):
    """Normalized `x`; far data has the mean subtracted first.

    `into` is what to write them to, and is returned then.
    """
    if not far and (x.dim() == 3 or x.dtype != mean.dtype):
        outputs = torch.native_batch_norm(
            x, gamma, beta, mean, variance, False, 0.0, epsilon
        )[0]
        return outputs if into is None else into.copy_(outputs)
    factor = scale_factor(gamma, variance, epsilon)
    if beta is None:
        beta = torch.zeros_like(mean)
    if not far:
        offset = torch.addcmul(beta, mean, factor, value=-1)
        return torch.addcmul(offset, x, factor, out=into)
    mean, factor, beta = (column(v, x) for v in (mean, factor, beta))
    outputs = torch.empty_like(x) if into is None else into
    for block, block_into in blocks(x, outputs):
        block_into.copy_(torch.addcmul(beta, block - mean, factor))
    return outputs


def _native_gradients(dy, x, gamma, mean, variance, count, epsilon):
    through_moments = count is not None
    return torch.ops.aten.native_batch_norm_backward(
        dy,
        x,
        gamma,
        mean,
        variance,
        mean,
        (variance + epsilon).rsqrt_() if through_moments else None,
        through_moments,
        epsilon,
        [True, True, True],
    )


def gradients(dy, x, gamma, mean, variance, count, epsilon, far, into=None):
    """`(dx, gamma_gradient, beta_gradient)`; without a `count` the moments
    are constants. `into` is what to write `dx` to."""
    vectors = gamma, mean, variance, count, epsilon
    if _adds_naively(x, mean.dtype):
        return _grouped_gradients(dy, x, *vectors, far, into)
    dx, *of_vectors = _native_gradients(dy, x, *vectors)
    return dx if into is None else into.copy_(dx), *of_vectors


def _adds_naively(x, dtype):
    """Whether the native gradients add so many terms one by one that it shows.

    Where `x` is shorter than `dtype` the rounding of the terms hides it, and
    with an `inner` dimension the kernel adds in float64.
    """
    return x.dim() == 2 and x.shape[0] > FEW and x.dtype == dtype


def _grouped_gradients(
    dy, x, gamma, mean, variance, count, epsilon, far, into=None
):
    """The native gradients, with sums over groups of positions."""
    sums = gradient_sums(dy, x, mean, variance, epsilon)
    vectors = gamma, mean, variance, count, epsilon
    return _input_gradient(dy, x, *sums, *vectors, far, into), *sums


def synchronized_gradients(
    dy, x, gamma, mean, variance, count, epsilon, far, replicas
):
    """`(dx, gamma_gradient, beta_gradient)` where the moments are those of all
    replicas; the latter two are those of this one."""
    sums = gradient_sums(dy, x, mean, variance, epsilon)
    totals = replicas.total(torch.stack(sums)).unbind()
    vectors = gamma, mean, variance, count, epsilon
    return _input_gradient(dy, x, *totals, *vectors, far), *sums


def gradient_sums(dy, x, mean, variance, epsilon):
    """The gradients of gamma and beta."""
    channels = x.shape[1]
    pairs = [(x, dy)]
    if _adds_naively(x, mean.dtype):
        pairs = zip(grouped_rows(x), grouped_rows(dy))
    products, plains = [], []
    for rows, dy_rows in pairs:
        groups = rows.shape[1] // channels
        _, product, plain = torch.ops.aten.native_batch_norm_backward(
            dy_rows,
            rows,
            None,
            mean.repeat(groups),
            variance.repeat(groups),
            None,
            None,
            False,
            epsilon,
            [False, True, True],
        )
        products.append(product)
        plains.append(plain)
    of_gamma, of_beta = (
        torch.cat(sums).view(-1, channels).sum(0) for sums in (products, plains)
    )
    return of_gamma, of_beta


def _input_gradient(
    dy,
    x,
    gamma_gradient,
    beta_gradient,
    gamma,
    mean,
    variance,
    count,
    epsilon,
    far,
    into=None,
):
    """`dx = factor * dy + slope * (x - mean) + shift`."""
    inverse = (variance + epsilon).rsqrt_()
    factor = inverse if gamma is None else gamma * inverse
    if count is None:
        return torch.mul(dy, column(factor, x), out=into)
    share = factor / -count
    slope = share * inverse * gamma_gradient
    shift = share * beta_gradient
    if not far:
        shift.addcmul_(slope, mean, value=-1)
    factor, mean, slope, shift = (
        column(vector, x) for vector in (factor, mean, slope, shift)
    )
    dx = torch.empty_like(x) if into is None else into
    for block, dy_block, dx_block in blocks(x, dy, dx):
        if far:
            block = block - mean
        if dx.dtype == mean.dtype:
            torch.addcmul(shift, block, slope, out=dx_block)
            dx_block.addcmul_(dy_block, factor)
        else:
            of_block = torch.addcmul(shift, block, slope)
            dx_block.copy_(of_block.addcmul_(dy_block, factor))
    return dx

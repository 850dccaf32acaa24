"""Masked moments and their gradients by native kernels, on flat CPU tensors.

`x` and `dy` are as in `native.py`; `keep` is like them, or has a single channel
where the mask is the same for all.

A mask of positions picks rows of channels-last data: those that it keeps are
gathered, and their moments are those of an ordinary batch. Elsewhere each
channel is shifted by the mean of a few of its own kept elements, and one pass
sums the deviations and their squares (Chan, Golub & LeVeque, "Algorithms for
computing the sample variance", 1983). Where the result says that the shift was
several deviations off, a second pass takes the mean just found.

A product with the mask is several times cheaper than a choice by it. What is
not finite in a masked position shows in the sums, and then they are taken again
of values that were chosen.
"""

import torch

from keras_bn.kernels.torch import native
from keras_bn.kernels.torch.plain import at_least_one
from keras_bn.kernels.torch.plain import moments_dtype
from keras_bn.kernels.torch.plain import scale_factor
from keras_bn.kernels.torch.views import blocks
from keras_bn.kernels.torch.views import column
from keras_bn.kernels.torch.views import reduced_axes

# Elements of a channel that the shift is the mean of, and how many deviations
# it may be off: `k` of them cost a factor `1 + k**2` in the variance's error.
_SAMPLES = 16
_TOLERANCE = 2.0


def moments(x, keep):
    """`(mean, variance, count)`, each of shape `(channels,)`."""
    dtype = moments_dtype(x.dtype)
    channels = x.shape[1]
    if x.dim() == 2 and keep.shape[1] == 1:
        rows = x.index_select(0, keep.view(-1).nonzero()[:, 0])
        count = torch.full([channels], float(len(rows)), dtype=dtype)
        if not len(rows):
            return count.clone(), count.clone(), count
        mean, variance, *_ = native.moments(rows)
        return mean, variance, count
    count = keep.sum(reduced_axes(x)).to(dtype).expand(channels)
    shift = _shift(x, keep, dtype)
    mean, variance = _moments_about(shift, x, keep, count, chosen=False)
    chosen = not variance.isfinite().all()
    if chosen:
        mean, variance = _moments_about(shift, x, keep, count, chosen)
    if ((mean - shift).square() > _TOLERANCE**2 * variance).any():
        mean, variance = _moments_about(mean, x, keep, count, chosen)
    return mean, variance, count


def _shift(x, keep, dtype):
    """The mean of a few kept elements of each channel, or 0."""
    picked, wanted = [slice(None)] * x.dim(), _SAMPLES
    for i in reduced_axes(x):
        step = max(x.shape[i] // wanted, 1)
        picked[i] = slice(step // 2, None, step)
        wanted = -(-wanted * step // x.shape[i])
    picked = tuple(picked)
    sample, kept = x[picked], keep[picked]
    total = torch.where(kept, sample, 0).sum(reduced_axes(x), dtype=dtype)
    return total / at_least_one(kept.sum(reduced_axes(x)))


def _moments_about(center, x, keep, count, chosen):
    first, second = 0.0, 0.0
    for block, kept in blocks(x, keep):
        deviation = block - column(center, x)
        if chosen:
            deviation.masked_fill_(~kept, 0.0)
        else:
            deviation.mul_(kept.to(deviation.dtype))
        first = first + deviation.sum(reduced_axes(x))
        second = second + deviation.square_().sum(reduced_axes(x))
    return native.moments_of_sums(center, first, second, count)


def gradients(
    dy, x, gamma, mean, variance, count, keep, epsilon, far, replicas
):
    """`(dx, gamma_gradient, beta_gradient)`."""
    moments = mean, variance, epsilon
    gamma_gradient, beta_gradient = native.gradient_sums(dy, x, *moments)
    if not gamma_gradient.isfinite().all():
        # What is neither finite nor kept counts as the mean.
        center = column(mean, x).to(x.dtype)
        x = torch.where(keep | x.isfinite(), x, center)
        gamma_gradient, beta_gradient = native.gradient_sums(dy, x, *moments)
    totals = gamma_gradient, beta_gradient
    if replicas is not None:
        totals = replicas.total(torch.stack(totals)).unbind()
    # dx = factor * dy + keep * (slope * (x - mean) + shift)
    factor = scale_factor(gamma, variance, epsilon)
    share = factor / -at_least_one(count)
    slope = share * (variance + epsilon).rsqrt_() * totals[0]
    shift = share * totals[1]
    # Times a slope up to 1 the largest float is finite still.
    may_overflow = not (slope.abs() <= 1.0).all()
    is_short = x.dtype != mean.dtype
    subtracts = far or is_short
    if not subtracts:
        shift = shift.addcmul(slope, mean, value=-1)
    mean, factor, slope, shift = (
        column(v, x) for v in (mean, factor, slope, shift)
    )
    dx = torch.empty_like(x)
    for dy_block, block, kept, into in blocks(dy, x, keep, dx):
        if may_overflow:
            block = torch.where(kept, block, 0)
        if subtracts:
            block = block - mean
        result = torch.addcmul(
            shift, block, slope, out=None if is_short else into
        )
        result.mul_(kept.to(mean.dtype))
        result.addcmul_(dy_block.to(mean.dtype), factor)
        if is_short:
            into.copy_(result)
    return dx, gamma_gradient, beta_gradient

"""The kernels on PyTorch: its native batch normalization, made accurate.

A dense tensor of any rank, axis and layout is seen, without a copy, as the
contiguous `(outer, channels, inner)`; for channels-last inputs `inner` is 1.

PyTorch's CPU kernels add one position after the other in the precision of the
moments, and scale the inputs before they subtract the mean. Either error grows
with the ratio of a channel's mean to its deviation. The first is held down by
taking the moments of groups of positions and merging them. Data is *far* where
in some channel that ratio is large nevertheless; then the moments are taken
again about the mean just found, and the mean is subtracted first. Both rules
are from Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance",
1983 (the pairwise algorithm and the shifted data).

All this is for CPU tensors in eager mode. On other devices and while a graph
is traced nothing may depend on the data, and plain operations are used.
"""

import torch

from keras_bn.kernels.torch import native
from keras_bn.kernels.torch import plain
from keras_bn.kernels.torch.plain import at_least_one
from keras_bn.kernels.torch.plain import moments_dtype
from keras_bn.kernels.torch.views import blocks
from keras_bn.kernels.torch.views import dense_order
from keras_bn.kernels.torch.views import flatten
from keras_bn.kernels.torch.views import reduced_axes
from keras_bn.kernels.torch.views import unflatten

# Far is where mean^2 > _FAR * variance: five bits would be lost.
_FAR = 2.0**10


@torch.no_grad()
def batch_moments(inputs, *, axis, mask=None, synchronized=False):
    """Mean and biased variance of each channel over the positions that count.

    Returns:
        `(mean, variance, count)`: `mean` and `variance` of shape
        `(channels,)`, float64 for float64 inputs and float32 otherwise;
        `count` an int or, under a mask, `(channels,)` of their dtype.
        They carry no gradient.
    """
    _refuse_synchronized(synchronized)
    mean, variance, count, _ = _moments(inputs, axis, mask)
    return mean, variance, count


def normalize_batch(
    inputs,
    gamma,
    beta,
    *,
    axis,
    epsilon,
    mask=None,
    moments=None,
    synchronized=False,
):
    """Normalizes with the moments of the batch itself.

    Keeps for the backward pass `inputs`, `mask` and vectors of shape
    `(channels,)`. Can be differentiated any number of times.

    Returns:
        `(outputs, mean, variance, count)`: `outputs` like `inputs`, the rest
        as from `batch_moments`.
    """
    _refuse_synchronized(synchronized)
    with torch.no_grad():
        if moments is None:
            mean, variance, count, far = _moments(inputs, axis, mask)
        else:
            mean, variance, count = moments
            far = _is_far(mean, variance)
    outputs = _Normalize.apply(
        inputs, gamma, beta, mean, variance, count, mask, axis, epsilon, far
    )
    return outputs, mean, variance, count


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """`gamma * (inputs - mean) / sqrt(variance + epsilon) + beta`.

    Returns:
        `outputs` like `inputs`; their gradient goes to `inputs`, `gamma` and
        `beta`.
    """
    far = _is_far(mean, variance)
    return _Normalize.apply(
        inputs, gamma, beta, mean, variance, None, None, axis, epsilon, far
    )


class _Normalize(torch.autograd.Function):
    """Normalizes with given moments.

    With a `count` they are the moments of `inputs`, and the gradient goes
    through them; without one they are constants.
    """

    @staticmethod
    def forward(
        ctx,
        inputs,
        gamma,
        beta,
        mean,
        variance,
        count,
        mask,
        axis,
        epsilon,
        far,
    ):
        ctx.save_for_backward(inputs, gamma, mean, variance, mask)
        ctx.count, ctx.axis, ctx.epsilon, ctx.far = count, axis, epsilon, far
        vectors = gamma, beta, mean, variance
        if not _is_eager_on_cpu(inputs):
            return plain.outputs(inputs, *vectors, axis, epsilon)
        if not inputs.numel():
            return torch.empty_like(inputs)
        order = dense_order(inputs)
        x = flatten(inputs, axis, order)
        flat = native.outputs(x, *vectors, epsilon, far)
        return unflatten(flat, inputs, order)

    @staticmethod
    def backward(ctx, output_gradient):
        inputs, gamma, mean, variance, mask = ctx.saved_tensors
        vectors = gamma, mean, variance, ctx.count
        if (
            torch.is_grad_enabled()
            or not _is_eager_on_cpu(inputs)
            or not inputs.numel()
        ):
            gradients = plain.gradients(
                output_gradient, inputs, *vectors, mask, ctx.axis, ctx.epsilon
            )
        else:
            order = dense_order(inputs)
            dy = flatten(output_gradient, ctx.axis, order)
            x = flatten(inputs, ctx.axis, order)
            if mask is not None:
                keep = flatten(mask.expand_as(inputs), ctx.axis, order)
                dx, *rest = native.masked_gradients(
                    dy, x, *vectors, keep, ctx.epsilon
                )
            else:
                dx, *rest = native.gradients(
                    dy, x, *vectors, ctx.epsilon, ctx.far
                )
            gradients = unflatten(dx, inputs, order), *rest
        gradients = [
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad)
        ]
        return *gradients, None, None, None, None, None, None, None


def _moments(inputs, axis, mask):
    """`mean`, `variance`, `count`, and whether the data is far."""
    if not _is_eager_on_cpu(inputs) or not inputs.numel():
        return *plain.moments(inputs, axis, mask), False
    order = dense_order(inputs)
    x = flatten(inputs, axis, order)
    dtype = moments_dtype(x.dtype)
    if mask is None:
        mean, variance = native.merged_moments(x, dtype)
        count = x.numel() // x.shape[1]
        far = _is_far(mean, variance)
        if far:
            mean, variance = native.moments_about(mean, x, None, count)
    else:
        keep = flatten(mask.expand_as(inputs), axis, order)
        count = keep.sum(reduced_axes(x)).to(dtype)
        total = sum(
            torch.where(kept, block, 0).sum(reduced_axes(x), dtype=dtype)
            for block, kept in blocks(x, keep)
        )
        mean = total / at_least_one(count)
        mean, variance = native.moments_about(mean, x, keep, count)
        far = _is_far(mean, variance)
    return mean, variance, count, far


def _is_far(mean, variance):
    """Whether some channel's mean is large against its deviation."""
    return _is_eager_on_cpu(mean) and bool(
        (mean * mean > _FAR * variance).any()
    )


def _is_eager_on_cpu(tensor):
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _refuse_synchronized(synchronized):
    if synchronized:
        raise ValueError(
            "synchronized=True is not supported on PyTorch yet. "
            f"Received: synchronized={synchronized}"
        )

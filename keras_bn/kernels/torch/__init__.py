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
is traced nothing may depend on the data, and plain operations are used. Where
`torch.func`, forward mode or a tracer has to see through them, they are left
to be differentiated by PyTorch.
"""

from itertools import zip_longest

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from keras_bn.kernels.torch import masked
from keras_bn.kernels.torch import native
from keras_bn.kernels.torch import plain
from keras_bn.kernels.torch import small_parts
from keras_bn.kernels.torch.plain import filled
from keras_bn.kernels.torch.replicas import merge
from keras_bn.kernels.torch.views import dense_order
from keras_bn.kernels.torch.views import flatten
from keras_bn.kernels.torch.views import flatten_mask
from keras_bn.kernels.torch.views import unflatten


@torch.no_grad()
def batch_moments(inputs, *, axis, mask=None, replicas=None):
    """Mean and biased variance of each channel over the positions that count.

    `replicas` are None or from `find_replicas`: those whose positions count
    too.

    Returns:
        `(mean, variance, count)`: `mean` and `variance` of shape
        `(channels,)`, float64 for float64 inputs and float32 otherwise;
        `count` an int or, under a mask, `(channels,)` of their dtype.
        They carry no gradient.
    """
    mean, variance, count, _ = _moments(inputs, axis, mask, replicas)
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
    replicas=None,
):
    """Normalizes with the moments of the batch itself.

    Keeps for the backward pass `inputs`, `mask` and vectors of shape
    `(channels,)`. Can be differentiated any number of times.

    Returns:
        `(outputs, mean, variance, count)`: `outputs` like `inputs`, the rest
        as from `batch_moments`.
    """
    gamma = _as_now(gamma)
    if _is_seen_through():
        if replicas is not None:
            raise ValueError(
                "Synchronized BatchNormalization is not for torch.func, "
                "forward mode and tracers. Received: synchronized=True "
                "inside of one. Call it with training=False there."
            )
        mean, variance, count = plain.moments(inputs, axis, mask)
        outputs = plain.outputs(
            inputs, gamma, beta, mean, variance, axis, epsilon
        )
        return outputs, mean.detach(), variance.detach(), count
    with torch.no_grad():
        if moments is None:
            mean, variance, count, far = _moments(
                inputs, axis, mask, replicas
            )
        else:
            mean, variance, count = moments
            far = _is_far(mean, variance)
    vectors = gamma, beta, mean, variance, count
    outputs = _Normalize.apply(
        inputs, *vectors, mask, axis, epsilon, far, replicas
    )
    return outputs, mean, variance, count


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """`gamma * (inputs - mean) / sqrt(variance + epsilon) + beta`.

    Returns:
        `outputs` like `inputs`; their gradient goes to every tensor.
    """
    gamma, mean, variance = map(_as_now, (gamma, mean, variance))
    if _is_seen_through():
        return plain.outputs(inputs, gamma, beta, mean, variance, axis, epsilon)
    far = _is_far(mean, variance)
    vectors = gamma, beta, mean, variance, None
    return _Normalize.apply(inputs, *vectors, None, axis, epsilon, far, None)


def normalize_ghost_batches(
    inputs, gamma, beta, *, axis, epsilon, size, mask=None
):
    """Normalizes parts of the batch, each with its own moments.

    Returns:
        `(outputs, mean, variance, count)`: `outputs` like `inputs`, the rest
        with a row for each part.
    """
    if mask is None and _has_native_parts(inputs):
        return _NormalizeParts.apply(
            inputs, _as_now(gamma), beta, axis, epsilon, size
        )
    parts = inputs.split(size)
    masks = [mask] * len(parts)
    if mask is not None and len(mask) > 1:
        masks = mask.split(size)
    results = [
        normalize_batch(x, gamma, beta, axis=axis, epsilon=epsilon, mask=kept)
        for x, kept in zip(parts, masks)
    ]
    outputs, means, variances, counts = zip(*results)
    means = torch.stack(means)
    counts = [filled(count, like=means) for count in counts]
    counts = torch.stack(counts).reshape(len(parts), -1)
    outputs = torch.cat(outputs)
    return outputs, means, torch.stack(variances), counts


class _Normalize(torch.autograd.Function):
    """Normalizes with given moments.

    With a `count` they are the moments of `inputs`, those of all replicas
    where there are, and the gradient goes through them; without one they are
    constants.
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
        replicas,
    ):
        # With constants for all but the inputs theirs are not needed.
        ctx.frozen = count is None and not any(ctx.needs_input_grad[1:5])
        kept = None if ctx.frozen else inputs
        ctx.save_for_backward(kept, gamma, mean, variance, mask)
        ctx.count, ctx.axis, ctx.epsilon, ctx.far = count, axis, epsilon, far
        ctx.replicas = replicas
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
        if ctx.frozen:
            dx = plain.input_gradient(
                output_gradient, gamma, variance, ctx.axis, ctx.epsilon
            )
            return dx, *[None] * (len(ctx.needs_input_grad) - 1)
        vectors = gamma, mean, variance, ctx.count
        if (
            torch.is_grad_enabled()
            or not _is_eager_on_cpu(inputs)
            or is_legacy_batchedtensor(output_gradient)
            or not inputs.numel()
        ):
            gradients = plain.gradients(
                output_gradient,
                inputs,
                *vectors,
                mask,
                ctx.axis,
                ctx.epsilon,
                ctx.replicas,
            )
        else:
            order = dense_order(inputs)
            dy = flatten(output_gradient, ctx.axis, order)
            x = flatten(inputs, ctx.axis, order)
            if mask is not None:
                keep = flatten_mask(mask, inputs, ctx.axis, order)
                dx, *rest = masked.gradients(
                    dy, x, *vectors, keep, ctx.epsilon, ctx.far, ctx.replicas
                )
            elif ctx.replicas is not None:
                dx, *rest = native.synchronized_gradients(
                    dy, x, *vectors, ctx.epsilon, ctx.far, ctx.replicas
                )
            else:
                dx, *rest = native.gradients(
                    dy, x, *vectors, ctx.epsilon, ctx.far
                )
            gradients = unflatten(dx, inputs, order), *rest
        if ctx.count is None and any(ctx.needs_input_grad[3:5]):
            gradients = (
                *gradients,
                *plain.gradients_of_constants(
                    *gradients[1:], gamma, variance, ctx.epsilon
                ),
            )
        gradients = [
            gradient if needed else None
            for gradient, needed in zip_longest(gradients, ctx.needs_input_grad)
        ]
        return tuple(gradients)


class _NormalizeParts(torch.autograd.Function):
    """Normalizes parts of the inputs, each with its own moments.

    What comes out is written where it belongs instead of being joined.
    """

    @staticmethod
    def forward(ctx, inputs, gamma, beta, axis, epsilon, size):
        order = dense_order(inputs)
        x = flatten(inputs, axis, order)
        rows = size * (x.shape[0] // inputs.shape[0])
        stacked = small_parts.stacked(x, rows)
        ctx.axis, ctx.epsilon, ctx.size = axis, epsilon, size
        if stacked is not None:
            outputs, means, variances = small_parts.normalize(
                stacked, gamma, beta, epsilon
            )
            ctx.counts, ctx.far = [rows] * len(means), [False] * len(means)
        else:
            outputs, means, variances, ctx.counts, ctx.far = _each_part(
                x, gamma, beta, epsilon, rows
            )
        counts = torch.tensor(ctx.counts, dtype=means.dtype)[:, None]
        ctx.save_for_backward(inputs, gamma, means, variances)
        ctx.mark_non_differentiable(means, variances, counts)
        outputs = unflatten(outputs, inputs, order)
        return outputs, means, variances, counts

    @staticmethod
    def backward(ctx, output_gradient, *_):
        inputs, gamma, means, variances = ctx.saved_tensors
        moments = means, variances, ctx.counts
        axis, epsilon = ctx.axis, ctx.epsilon
        if (
            torch.is_grad_enabled()
            or not _is_eager_on_cpu(inputs)
            or is_legacy_batchedtensor(output_gradient)
        ):
            tensors = (t.split(ctx.size) for t in (output_gradient, inputs))
            dx, *of_vectors = zip(
                *(
                    plain.gradients(dy, x, gamma, *own, None, axis, epsilon)
                    for dy, x, *own in zip(*tensors, *moments)
                )
            )
            gradients = torch.cat(dx), *map(sum, of_vectors)
        else:
            order = dense_order(inputs)
            x = flatten(inputs, axis, order)
            dy = flatten(output_gradient, axis, order)
            rows = ctx.size * (x.shape[0] // inputs.shape[0])
            stacked = small_parts.stacked(x, rows)
            if stacked is not None:
                dx, *of_vectors = small_parts.gradients(
                    dy.view_as(stacked),
                    stacked,
                    gamma,
                    means,
                    variances,
                    epsilon,
                )
            else:
                dx = torch.empty_like(x)
                tensors = (t.split(rows) for t in (dy, x, dx))
                of_vectors = [
                    native.gradients(y, x, gamma, *own, epsilon, far, into)[1:]
                    for y, x, into, *own, far in zip(
                        *tensors, *moments, ctx.far
                    )
                ]
                of_vectors = (torch.stack(v).sum(0) for v in zip(*of_vectors))
            gradients = unflatten(dx, inputs, order), *of_vectors
        gradients = [
            gradient if needed else None
            for gradient, needed in zip_longest(gradients, ctx.needs_input_grad)
        ]
        return tuple(gradients)


def _as_now(vector):
    """A copy that the backward pass may keep.

    The vector may be a variable, to which values are assigned in place.
    """
    if vector is None or not torch.is_grad_enabled():
        return vector
    return vector.clone()


def _each_part(x, gamma, beta, epsilon, rows):
    """Outputs, means, variances, counts, and whether each part is far."""
    outputs = torch.empty_like(x)
    moments = []
    for part, into in zip(x.split(rows), outputs.split(rows)):
        mean, variance, count, far = native.moments(part)
        native.outputs(part, gamma, beta, mean, variance, epsilon, far, into)
        moments.append((mean, variance, count, far))
    means, variances, counts, far = zip(*moments)
    return outputs, torch.stack(means), torch.stack(variances), counts, far


def _has_native_parts(inputs):
    """Whether parts of the inputs are parts of what the kernels see."""
    if not _is_eager_on_cpu(inputs) or not inputs.numel():
        return False
    order = dense_order(inputs)
    return order is None or order[0] == 0


def _moments(inputs, axis, mask, replicas):
    """`mean`, `variance`, `count`, and whether the data is far."""
    moments = _own_moments(inputs, axis, mask)
    if replicas is None:
        return moments
    mean, variance, count = merge(replicas, *moments[:3])
    return mean, variance, count, _is_far(mean, variance)


def _own_moments(inputs, axis, mask):
    if not _is_eager_on_cpu(inputs) or not inputs.numel():
        return *plain.moments(inputs, axis, mask), False
    order = dense_order(inputs)
    x = flatten(inputs, axis, order)
    if mask is None:
        return native.moments(x)
    keep = flatten_mask(mask, inputs, axis, order)
    mean, variance, count = masked.moments(x, keep)
    return mean, variance, count, native.is_far(mean, variance)


def _is_far(mean, variance):
    return _is_eager_on_cpu(mean) and native.is_far(mean, variance)


def _is_eager_on_cpu(tensor):
    return (
        tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not _is_seen_through()
    )


def _is_seen_through():
    """Whether each operation is looked at, by a transform or a tracer.

    `torch.compile` is none of them: it knows custom functions.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
    )

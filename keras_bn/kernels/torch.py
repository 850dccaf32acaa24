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

import math

import torch

# Elements worked on at a time: what follows finds them in the cache.
_BLOCK = 2**20
# Channels at which the native kernels are fastest: enough of them for vector
# instructions, few enough for the nearest cache.
_WIDTH = 512
# Rows added one after the other without any harm; with little, eight times as
# many.
_FEW = 1024
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
            return _plain_outputs(inputs, *vectors, axis, epsilon)
        if not inputs.numel():
            return torch.empty_like(inputs)
        order = _dense_order(inputs)
        x = _flatten(inputs, axis, order)
        return _unflatten(_outputs(x, *vectors, epsilon, far), inputs, order)

    @staticmethod
    def backward(ctx, output_gradient):
        inputs, gamma, mean, variance, mask = ctx.saved_tensors
        vectors = gamma, mean, variance, ctx.count
        if (
            torch.is_grad_enabled()
            or not _is_eager_on_cpu(inputs)
            or not inputs.numel()
        ):
            gradients = _plain_gradients(
                output_gradient, inputs, *vectors, mask, ctx.axis, ctx.epsilon
            )
        else:
            order = _dense_order(inputs)
            dy = _flatten(output_gradient, ctx.axis, order)
            x = _flatten(inputs, ctx.axis, order)
            if mask is not None:
                keep = _flatten(mask.expand_as(inputs), ctx.axis, order)
                dx, *rest = _masked_gradients(
                    dy, x, *vectors, keep, ctx.epsilon
                )
            elif _adds_naively(x, mean.dtype):
                dx, *rest = _grouped_gradients(
                    dy, x, *vectors, ctx.epsilon, ctx.far
                )
            else:
                dx, *rest = _native_gradients(dy, x, *vectors, ctx.epsilon)
            gradients = _unflatten(dx, inputs, order), *rest
        gradients = [
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad)
        ]
        return *gradients, None, None, None, None, None, None, None


# On the CPU. `x`, `keep` and `dy` are of shape `(outer, channels, inner)`, or
# `(outer, channels)` where `inner` would be 1.


def _moments(inputs, axis, mask):
    """`mean`, `variance`, `count`, and whether the data is far."""
    if not _is_eager_on_cpu(inputs) or not inputs.numel():
        return *_plain_moments(inputs, axis, mask), False
    order = _dense_order(inputs)
    x = _flatten(inputs, axis, order)
    dtype = _moments_dtype(x.dtype)
    if mask is None:
        mean, variance = _merged_moments(x, dtype)
        count = x.numel() // x.shape[1]
        far = _is_far(mean, variance)
        if far:
            mean, variance = _moments_about(mean, x, None, count)
    else:
        keep = _flatten(mask.expand_as(inputs), axis, order)
        count = keep.sum(_reduced(x)).to(dtype)
        total = sum(
            torch.where(kept, block, 0).sum(_reduced(x), dtype=dtype)
            for block, kept in _blocks(x, keep)
        )
        mean = total / _divisor(count)
        mean, variance = _moments_about(mean, x, keep, count)
        far = _is_far(mean, variance)
    return mean, variance, count, far


def _merged_moments(x, dtype):
    """Moments of groups of positions, merged to those of all positions."""
    channels = x.shape[1]
    if x.dim() == 2 and x.shape[0] <= _FEW:
        return _native_moments(x, dtype)
    means, variances, lengths = [], [], []
    if x.dim() == 2:
        for rows in _grouped_rows(x):
            mean, variance = _native_moments(rows, dtype)
            means.append(mean.view(-1, channels))
            variances.append(variance.view(-1, channels))
            lengths += [rows.shape[0]] * means[-1].shape[0]
    else:
        for (block,) in _blocks(x):
            length = block.shape[0] * block.shape[2]
            mean = block.sum(2, dtype=dtype).sum(0).div_(length)
            deviation = block - mean[:, None]
            means.append(mean[None])
            variances.append(
                deviation.square_().sum(2).sum(0, True).div_(length)
            )
            lengths.append(length)
    total = sum(lengths)
    weights = [length / total for length in lengths]
    weights = torch.tensor(weights, dtype=dtype)
    means = torch.cat(means)
    mean = weights @ means
    offsets = means - mean
    return mean, weights @ torch.cat(variances).addcmul_(offsets, offsets)


def _native_moments(x, dtype):
    # The kernel returns its moments in the dtype of the running ones, or else
    # in that of `x`; with momentum 0 it leaves the running ones alone.
    running = None
    if x.dtype != dtype:
        running = torch.zeros(x.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(x, running, running, 0.0)


def _moments_about(center, x, keep, count):
    """Moments from the deviations from a vector near the mean."""
    first, second = 0.0, 0.0
    for block, *kept in _blocks(x) if keep is None else _blocks(x, keep):
        deviation = block - _column(center, x)
        if kept:
            deviation.masked_fill_(~kept[0], 0.0)
        first = first + deviation.sum(_reduced(x))
        second = second + deviation.square_().sum(_reduced(x))
    divisor = _divisor(count)
    offset = first / divisor
    variance = second / divisor - offset.square()
    return center + offset, variance.clamp_(min=0)


def _is_far(mean, variance):
    """Whether some channel's mean is large against its deviation."""
    return _is_eager_on_cpu(mean) and bool(
        (mean * mean > _FAR * variance).any()
    )


def _outputs(x, gamma, beta, mean, variance, epsilon, far):
    if not far and (x.dim() == 3 or x.dtype != mean.dtype):
        return torch.native_batch_norm(
            x, gamma, beta, mean, variance, False, 0.0, epsilon
        )[0]
    factor = _factor(gamma, variance, epsilon)
    if beta is None:
        beta = torch.zeros_like(mean)
    if not far:
        return torch.addcmul(
            torch.addcmul(beta, mean, factor, value=-1), x, factor
        )
    mean, factor, beta = (_column(v, x) for v in (mean, factor, beta))
    outputs = torch.empty_like(x)
    for block, into in _blocks(x, outputs):
        into.copy_(torch.addcmul(beta, block - mean, factor))
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


def _adds_naively(x, dtype):
    """Whether the native gradients add so many terms one by one that it shows.

    Where `x` is shorter than `dtype` the rounding of the terms hides it, and
    with an `inner` dimension the kernel adds in float64.
    """
    return x.dim() == 2 and x.shape[0] > _FEW and x.dtype == dtype


def _grouped_gradients(dy, x, gamma, mean, variance, count, epsilon, far):
    """The native gradients, with sums over groups of positions."""
    channels = x.shape[1]
    products, plains = [], []
    for rows, dy_rows in zip(_grouped_rows(x), _grouped_rows(dy)):
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
    gamma_gradient = torch.cat(products).view(-1, channels).sum(0)
    beta_gradient = torch.cat(plains).view(-1, channels).sum(0)

    inverse = (variance + epsilon).rsqrt_()
    factor = inverse if gamma is None else gamma * inverse
    if count is None:
        return dy * factor, gamma_gradient, beta_gradient

    # dx = factor * dy + slope * (x - mean) + shift
    share = factor / -count
    slope = share * inverse * gamma_gradient
    shift = share * beta_gradient
    if not far:
        shift.addcmul_(slope, mean, value=-1)
    dx = torch.empty_like(x)
    for block, dy_block, into in _blocks(x, dy, dx):
        if far:
            block = block - mean
        torch.addcmul(shift, block, slope, out=into)
        into.addcmul_(dy_block, factor)
    return dx, gamma_gradient, beta_gradient


def _masked_gradients(dy, x, gamma, mean, variance, count, keep, epsilon):
    """Gradients where only the kept positions entered the moments."""
    mean = _column(mean, x)
    inverse = _column((variance + epsilon).rsqrt_(), x)
    gamma_gradient, beta_gradient = 0.0, 0.0
    for dy_block, block, kept in _blocks(dy, x, keep):
        normalized = _normalized(block, mean, inverse, kept)
        gamma_gradient = gamma_gradient + (normalized * dy_block).sum(
            _reduced(x)
        )
        beta_gradient = beta_gradient + dy_block.sum(
            _reduced(x), dtype=mean.dtype
        )
    divisor = _divisor(count)
    slope = _column(gamma_gradient / divisor, x)
    shift = _column(beta_gradient / divisor, x)
    factor = _column(_factor(gamma, variance, epsilon), x)
    dx = torch.empty_like(x)
    for dy_block, block, kept, into in _blocks(dy, x, keep, dx):
        normalized = _normalized(block, mean, inverse, kept)
        through_moments = torch.addcmul(shift, normalized, slope)
        through_moments.masked_fill_(~kept, 0.0)
        into.copy_((dy_block - through_moments).mul_(factor))
    return dx, gamma_gradient, beta_gradient


# The same in plain operations, on the shape of the inputs: for any device,
# traceable, and differentiable again.


def _plain_moments(inputs, axis, mask):
    dtype = _moments_dtype(inputs.dtype)
    reduced = [i for i in range(inputs.dim()) if i != axis]
    x = inputs.to(dtype)
    if mask is None:
        count = x.numel() // max(x.shape[axis], 1)
    else:
        count = mask.expand_as(x).sum(reduced).to(dtype)
        x = torch.where(mask, x, 0.0)
    divisor = _divisor(count)
    mean = x.sum(reduced) / divisor
    deviation = x - _along(axis, mean, x)
    if mask is not None:
        deviation = torch.where(mask, deviation, 0.0)
    return mean, deviation.square().sum(reduced) / divisor, count


def _plain_outputs(inputs, gamma, beta, mean, variance, axis, epsilon):
    factor = _factor(gamma, variance, epsilon)
    outputs = (inputs - _along(axis, mean, inputs)) * _along(
        axis, factor, inputs
    )
    if beta is not None:
        outputs = outputs + _along(axis, beta, inputs)
    return outputs.to(inputs.dtype)


def _plain_gradients(
    dy, inputs, gamma, mean, variance, count, mask, axis, epsilon
):
    if count is not None and torch.is_grad_enabled():
        mean, variance, _ = _plain_moments(inputs, axis, mask)
    reduced = [i for i in range(inputs.dim()) if i != axis]
    normalized = _normalized(
        inputs,
        _along(axis, mean, inputs),
        _along(axis, (variance + epsilon).rsqrt(), inputs),
        mask,
    )
    dx = dy = dy.to(mean.dtype)
    gamma_gradient = (dy * normalized).sum(reduced)
    beta_gradient = dy.sum(reduced)
    if count is not None:
        divisor = _divisor(count)
        through_moments = _along(
            axis, beta_gradient / divisor, inputs
        ) + normalized * _along(axis, gamma_gradient / divisor, inputs)
        if mask is not None:
            through_moments = torch.where(mask, through_moments, 0.0)
        dx = dy - through_moments
    dx = dx * _along(axis, _factor(gamma, variance, epsilon), inputs)
    return dx.to(inputs.dtype), gamma_gradient, beta_gradient


def _along(axis, vector, tensor):
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return vector.reshape(shape)


# Used by all of them.


def _normalized(x, mean, inverse, keep):
    """Normalized inputs; those neither finite nor kept count as the mean."""
    deviation = x - mean
    if keep is not None:
        deviation = torch.where(keep | deviation.isfinite(), deviation, 0.0)
    return deviation * inverse


def _factor(gamma, variance, epsilon):
    inverse = (variance + epsilon).rsqrt()
    return inverse if gamma is None else gamma * inverse


def _divisor(count):
    return max(count, 1) if isinstance(count, int) else count.clamp(min=1)


def _moments_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _is_eager_on_cpu(tensor):
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _refuse_synchronized(synchronized):
    if synchronized:
        raise ValueError(
            "synchronized=True is not supported on PyTorch yet. "
            f"Received: synchronized={synchronized}"
        )


# Views.


def _dense_order(tensor):
    """The order of dimensions in which a dense tensor is contiguous.

    None where that is the order they have, or where there is no such order.
    """
    if not tensor.is_contiguous():
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda i: -strides[i])
        if tensor.permute(order).is_contiguous():
            return order
    return None


def _flatten(tensor, axis, order):
    """`tensor` as `(outer, channels[, inner])`, copied only if it must be."""
    if order is not None:
        tensor = tensor.permute(order)
        axis = order.index(axis)
    shape = tensor.shape
    flat = [math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])]
    return tensor.reshape(flat if flat[2] > 1 else flat[:2]).contiguous()


def _unflatten(flat, like, order):
    """Undoes `_flatten`, in place: PyTorch lets nobody write to a view that a
    custom function returns."""
    if order is None:
        return flat.resize_(like.shape)
    shape = [like.shape[i] for i in order]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.as_strided_(like.shape, [strides[i] for i in inverse])


def _column(vector, x):
    return vector if x.dim() == 2 else vector[:, None]


def _reduced(x):
    return (0,) if x.dim() == 2 else (0, 2)


def _blocks(*tensors):
    """Cuts flattened tensors of one shape into blocks."""
    first = tensors[0]
    rows = max(1, _BLOCK // max(1, first[0].numel()))
    slabs = zip(*(tensor.split(rows) for tensor in tensors))
    if first.dim() == 2:
        yield from slabs
        return
    columns = max(1, _BLOCK // (first.shape[1] * min(rows, first.shape[0])))
    for slab in slabs:
        yield from zip(*(tensor.split(columns, 2) for tensor in slab))


def _grouped_rows(x):
    """Cuts `(outer, channels)` into blocks of rows laid side by side.

    With `groups` rows side by side there are `groups * channels` columns, each
    of which is a channel's share of one group.
    """
    outer, channels = x.shape
    groups = max(1, min(_WIDTH // channels, outer // _FEW))
    even = outer - outer % groups
    width = groups * channels
    yield from x[:even].view(-1, width).split(8 * _FEW)
    if even < outer:
        yield x[even:]

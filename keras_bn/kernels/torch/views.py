"""How the PyTorch kernels see a tensor of any rank, axis and layout."""

import math

# Elements worked on at a time: what follows finds them in the cache.
_BLOCK = 2**20
# Channels at which the native kernels are fastest: enough of them for vector
# instructions, few enough for the nearest cache.
_WIDTH = 512
# Rows added one after the other without any harm.
FEW = 1024


def along(axis, vector, tensor):
    """`vector` in a shape that broadcasts along `axis` of `tensor`."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return vector.reshape(shape)


def dense_order(tensor):
    """The order of dimensions in which a dense tensor is contiguous.

    None where that is the order they have, or where there is no such order.
    """
    if not tensor.is_contiguous():
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda i: -strides[i])
        if tensor.permute(order).is_contiguous():
            return order
    return None


def flatten(tensor, axis, order):
    """`tensor` as `(outer, channels[, inner])`, copied only if it must be."""
    if order is not None:
        tensor = tensor.permute(order)
        axis = order.index(axis)
    shape = tensor.shape
    flat = [math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])]
    return tensor.reshape(flat if flat[2] > 1 else flat[:2]).contiguous()


def flatten_mask(mask, inputs, axis, order):
    """As `flatten` does it to `inputs`, but with one channel where the mask is
    the same for all."""
    shape = list(inputs.shape)
    shape[axis] = mask.shape[axis]
    return flatten(mask.expand(shape), axis, order)


def unflatten(flat, like, order):
    """Undoes `flatten`, in place: PyTorch lets nobody write to a view that a
    custom function returns."""
    if order is None:
        return flat.resize_(like.shape)
    shape = [like.shape[i] for i in order]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.as_strided_(like.shape, [strides[i] for i in inverse])


def column(vector, x):
    """`vector` in a shape that broadcasts along the channels of flat `x`."""
    return vector if x.dim() == 2 else vector[:, None]


def reduced_axes(x):
    """The axes of flat `x` that its moments are taken over."""
    return (0,) if x.dim() == 2 else (0, 2)


def blocks(*tensors):
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


def grouped_rows(x):
    """Cuts `(outer, channels)` into blocks of rows laid side by side.

    With `groups` rows side by side there are `groups * channels` columns, each
    of which is a channel's share of one group.
    """
    outer, channels = x.shape
    groups = max(1, min(_WIDTH // channels, outer // FEW))
    even = outer - outer % groups
    width = groups * channels
    yield from x[:even].view(-1, width).split(FEW)
    if even < outer:
        yield x[even:]

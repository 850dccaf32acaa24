"""Several channel axes, seen as one.

The kernels know one channel axis. Statistics for every index of several axes
are those of one axis in which these are merged: by a reshape where the axes
are neighbours, else by a transpose first.
"""

import math

from keras import ops


def weights_shape(sizes, rank):
    """`(channels,)`; for several axes of the inputs' rank, else size 1.

    Args:
        sizes: From each channel axis to its size.
        rank: Of the inputs.
    """
    if len(sizes) == 1:
        return tuple(sizes.values())
    return tuple(sizes.get(i, 1) for i in range(rank))


def merge_channel_axes(tensor, axes):
    """Makes one axis of `axes`.

    Args:
        tensor: Tensor whose sizes along `axes` are known.
        axes: Sorted tuple of ints in `[0, rank)`.

    Returns:
        `(merged, axis)`: the tensor and its channel axis.
    """
    if len(axes) == 1:
        return tensor, axes[0]
    if not _are_neighbours(axes):
        tensor = ops.transpose(tensor, _to_the_back(axes, len(tensor.shape)))
        axes = range(len(tensor.shape) - len(axes), len(tensor.shape))
    shape = ops.shape(tensor)
    first, last = axes[0], axes[-1]
    channels = math.prod(tensor.shape[first : last + 1])
    merged = (*shape[:first], channels, *shape[last + 1 :])
    return ops.reshape(tensor, merged), first


def split_channel_axes(merged, like, axes):
    """Undoes `merge_channel_axes`.

    Args:
        merged: Tensor in which `axes` are one.
        like: Tensor of the shape to go back to.
        axes: As for `merge_channel_axes`.

    Returns:
        The tensor in the shape of `like`.
    """
    if len(axes) == 1:
        return merged
    shape = ops.shape(like)
    if _are_neighbours(axes):
        return ops.reshape(merged, shape)
    order = _to_the_back(axes, len(shape))
    merged = ops.reshape(merged, [shape[i] for i in order])
    return ops.transpose(
        merged, sorted(range(len(order)), key=order.__getitem__)
    )


def merge_mask_axes(mask, like, axes):
    """`merge_channel_axes` for a mask that is broadcastable to `like`."""
    if len(axes) > 1 and any(mask.shape[i] != 1 for i in axes):
        shape = list(ops.shape(mask))
        for i in axes:
            shape[i] = like.shape[i]
        mask = ops.broadcast_to(mask, shape)
    return merge_channel_axes(mask, axes)[0]


def _are_neighbours(axes):
    return list(axes) == list(range(axes[0], axes[-1] + 1))


def _to_the_back(axes, rank):
    return [i for i in range(rank) if i not in axes] + list(axes)

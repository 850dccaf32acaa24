"""From what a layer is called with to what the kernels take."""

import math

from keras import ops

from keras_bn.channel_axes import merge_channel_axes
from keras_bn.channel_axes import merge_mask_axes
from keras_bn.masks import full_rank_mask


def as_kernels_see(inputs, mask, sizes):
    """One channel axis, a mask of full rank.

    Args:
        inputs: Tensor of rank 2 or more.
        mask: None, or a tensor as the layer's call takes it.
        sizes: From each channel axis, in `[0, rank)` and in order, to its
            size, as the layer was built for.

    Returns:
        `(inputs, merged, axis, mask)`: the inputs with known channels, the
        same with all channel axes in one, that axis, and the mask for it.

    Raises:
        ValueError: the shape of `mask` does not fit.
    """
    inputs = ops.convert_to_tensor(inputs)
    axes = tuple(sizes)
    if any(inputs.shape[axis] is None for axis in axes):
        # The graph does not know what the layer was built for.
        shape = enumerate(ops.shape(inputs))
        inputs = ops.reshape(inputs, [sizes.get(i, n) for i, n in shape])
    if mask is not None:
        mask = full_rank_mask(mask, inputs.shape, axes)
        mask = merge_mask_axes(mask, inputs, axes)
    return inputs, *merge_channel_axes(inputs, axes), mask


def axes_of_rows(sizes, rank, shape):
    """The channel axes of ragged inputs, in the tensor of their rows.

    Args:
        sizes: As for `as_kernels_see`, of the ragged inputs.
        rank: How many axes, after the first one, are in the rows' first.
        shape: Of the ragged inputs.

    Raises:
        ValueError: a channel axis is among those.
    """
    if min(sizes) <= rank:
        raise ValueError(
            f"The channel axis must come after the ragged axes 1 to {rank}. "
            f"Received: channel axis {min(sizes)} of "
            f"inputs.shape={tuple(shape)}."
        )
    return {axis - rank: size for axis, size in sizes.items()}


def counts_of_parts(shape, axis, size):
    """How many positions each part of a batch has that is split by `size`.

    Args:
        shape: Of what the kernels see.
        axis: Of the channels, not 0.
        size: How many samples are a part; the last one may have fewer.

    Returns:
        A tuple of ints, a single 0 for an empty batch; None where the shape
        is not known.
    """
    if not all(isinstance(n, int) for n in shape):
        return None
    batch, *others = shape
    positions = math.prod(others) // max(shape[axis], 1)
    starts = range(0, batch, size) or [0]
    return tuple(min(size, batch - x) * positions for x in starts)

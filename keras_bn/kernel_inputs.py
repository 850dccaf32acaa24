"""From what a layer is called with to what the kernels take."""

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

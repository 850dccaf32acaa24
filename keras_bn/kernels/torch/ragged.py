"""Jagged nested tensors: their rows lie one after the other in a dense one."""

import torch

from keras_bn.kernels.refusals import refuse_mask_of_other_rows
from keras_bn.kernels.refusals import refuse_sparse


def rows_of(inputs, mask):
    """See `keras_bn.kernels`."""
    layout = getattr(inputs, "layout", torch.strided)
    if layout is torch.strided:
        return None
    if layout is not torch.jagged:
        refuse_sparse(inputs.shape, "x.to_dense()")
    ragged = [i for i, n in enumerate(inputs.shape) if not isinstance(n, int)]
    if ragged != [1]:
        raise ValueError(
            "A nested tensor must be ragged along axis 1. "
            f"Received: inputs.shape={tuple(inputs.shape)}. Transpose it."
        )
    if inputs.lengths() is not None:
        # There are gaps between its rows.
        inputs = inputs.contiguous()
    if mask is not None:
        if not mask.is_nested or not torch.equal(
            mask.offsets(), inputs.offsets()
        ):
            refuse_mask_of_other_rows(mask.shape, inputs.shape)
        mask = mask.values()
    offsets = inputs.offsets()

    def restore(rows):
        return torch.nested.nested_tensor_from_jagged(rows, offsets)

    return inputs.values(), mask, 1, restore

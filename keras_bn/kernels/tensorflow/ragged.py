"""Ragged tensors: their rows lie one after the other in a dense one."""

import tensorflow as tf

from keras_bn.kernels.refusals import refuse_mask_of_other_rows
from keras_bn.kernels.refusals import refuse_sparse


def rows_of(inputs, mask):
    """See `keras_bn.kernels`."""
    if isinstance(inputs, tf.SparseTensor):
        refuse_sparse(inputs.shape, "tf.sparse.to_dense(x)")
    if not isinstance(inputs, tf.RaggedTensor):
        return None
    rank = inputs.ragged_rank
    if mask is not None:
        if getattr(mask, "ragged_rank", 0) != rank:
            refuse_mask_of_other_rows(mask.shape, inputs.shape)
        # It raises where the rows end elsewhere.
        mask = tf.ragged.map_flat_values(lambda _, kept: kept, inputs, mask)
        mask = mask.flat_values
    return inputs.flat_values, mask, rank, inputs.with_flat_values

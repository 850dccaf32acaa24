"""What no kernel takes, said alike on every backend."""


def refuse_sparse(shape, as_dense):
    """Raises ValueError: normalizing would fill in the zeros.

    Args:
        shape: Of the sparse tensor.
        as_dense: What the user types to have a dense one.
    """
    raise ValueError(
        "BatchNormalization takes no sparse tensor: with the mean subtracted "
        f"nothing of it is 0. Received: a sparse tensor of shape "
        f"{tuple(shape)}. Give `{as_dense}`."
    )


def refuse_mask_of_other_rows(mask_shape, shape):
    """Raises ValueError: mask and inputs are not ragged in the same way."""
    raise ValueError(
        "The mask of a ragged tensor must be ragged as the inputs are. "
        f"Received: mask.shape={tuple(mask_shape)}, "
        f"inputs.shape={tuple(shape)}."
    )

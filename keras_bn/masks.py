"""How the layer reads a mask."""

from keras import ops


def full_rank_mask(mask, shape, axis):
    """Gives a mask the rank of the inputs, of shape `shape`.

    A mask of one axis less is meant for positions and lacks the channel axis,
    or, as Keras reads it, the last one. With channels last that is the same;
    elsewhere the sizes tell, and where they do not nothing is guessed.
    """
    mask = ops.cast(mask, "bool")
    rank = len(shape)
    if len(mask.shape) == rank:
        candidates = [tuple(mask.shape)]
    elif len(mask.shape) == rank - 1:
        front, back = tuple(mask.shape[:axis]), tuple(mask.shape[axis:])
        candidates = [(*front, 1, *back), (*mask.shape, 1)]
    else:
        raise ValueError(
            "The mask provided should be one dimension less than the inputs, "
            "or have as many. Received: "
            f"mask.shape={tuple(mask.shape)}, inputs.shape={tuple(shape)}"
        )
    fitting = {c: None for c in candidates if _broadcasts(c, shape)}
    if not fitting:
        raise ValueError(
            "The mask must be broadcastable to the inputs without their "
            f"channel axis {axis}. Received: mask.shape={tuple(mask.shape)}, "
            f"inputs.shape={tuple(shape)}."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The mask could lack the channel axis {axis} or the last axis of "
            "the inputs; both fit. Received: "
            f"mask.shape={tuple(mask.shape)}, inputs.shape={tuple(shape)}. "
            "Pass it with the rank of the inputs, size 1 where it is the same "
            "for all."
        )
    if len(mask.shape) == rank:
        return mask
    return ops.expand_dims(mask, -1 if candidates[1] in fitting else axis)


def _broadcasts(shape, to):
    return all(
        a is None or b is None or a in (1, b)
        for a, b in zip(shape, to, strict=True)
    )

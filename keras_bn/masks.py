"""How the layer reads a mask."""

from keras import ops


def full_rank_mask(mask, shape, axes):
    """Gives a mask the rank of the inputs, of shape `shape`.

    A mask of less axes is meant for positions and lacks the channel axes, or,
    as Keras reads it, the last one. With channels last that is the same;
    elsewhere the sizes tell, and where they do not nothing is guessed.
    """
    mask = ops.cast(mask, "bool")
    rank = len(shape)
    lacking = [()] if len(mask.shape) == rank else []
    if len(mask.shape) == rank - len(axes):
        lacking.append(axes)
    if len(mask.shape) == rank - 1:
        lacking.append((rank - 1,))
    if not lacking:
        raise ValueError(
            "The mask provided should be one dimension less than the inputs, "
            "or have as many. Received: "
            f"mask.shape={tuple(mask.shape)}, inputs.shape={tuple(shape)}"
        )
    # The shape at full rank, and which axes it was given.
    candidates = {_with_ones(mask.shape, which): which for which in lacking}
    fitting = [c for c in candidates if _broadcasts(c, shape)]
    channel_axes = " and ".join(map(str, axes))
    if not fitting:
        raise ValueError(
            "The mask must be broadcastable to the inputs without their "
            f"channel axis {channel_axes}. Received: "
            f"mask.shape={tuple(mask.shape)}, inputs.shape={tuple(shape)}."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The mask could lack the channel axis {channel_axes} or the last "
            "axis of the inputs; both fit. Received: "
            f"mask.shape={tuple(mask.shape)}, inputs.shape={tuple(shape)}. "
            "Pass it with the rank of the inputs, size 1 where it is the same "
            "for all."
        )
    for axis in candidates[fitting[0]]:
        mask = ops.expand_dims(mask, axis)
    return mask


def _with_ones(shape, axes):
    shape = list(shape)
    for axis in axes:
        shape.insert(axis, 1)
    return tuple(shape)


def _broadcasts(shape, to):
    return all(
        a is None or b is None or a in (1, b)
        for a, b in zip(shape, to, strict=True)
    )

"""What the layer accepts as arguments; one sentence refuses the rest."""

import math
import numbers

import keras
import numpy as np


def checked_axis_name(name):
    """`name` as a str or a tuple of them, or None, else ValueError."""
    if name is None:
        return None
    names = [name] if isinstance(name, str) else name
    if not isinstance(names, (tuple, list)) or not all(
        isinstance(one, str) for one in names
    ):
        raise ValueError(
            "`axis_name` must be a string or a tuple of them. "
            f"Received: axis_name={name!r}."
        )
    return name if isinstance(name, str) else tuple(name)


def refuse_axis_name_off_jax(name):
    """Raises ValueError where an axis has a name and there are none."""
    if name is not None and keras.backend.backend() != "jax":
        raise ValueError(
            "`axis_name` names an axis of JAX's shard_map or pmap. Received: "
            f"axis_name={name!r} with the backend "
            f"{keras.backend.backend()!r}. Leave it out."
        )


def flag(name, value):
    """`value` as a bool; what is neither True nor False raises ValueError."""
    is_number = isinstance(value, (numbers.Number, np.bool_))
    if is_number and value in (0, 1):
        return bool(value)
    raise ValueError(
        f"`{name}` must be True or False. Received: {name}={shown(value)}."
    )


def checked_virtual_batch_size(size, renorm):
    """`size` as an int of at least 1, or None, else ValueError."""
    if size is None:
        return None
    whole = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    if not whole or size < 1:
        raise ValueError(
            "`virtual_batch_size` must be an integer of at least 1, or None. "
            f"Received: virtual_batch_size={size!r}."
        )
    if renorm:
        raise ValueError(
            "`virtual_batch_size` does not work together with `renorm`. "
            f"Received: virtual_batch_size={size}, renorm={renorm}."
        )
    return int(size)


def checked_momentum(momentum, debias):
    """`momentum` as a float in [0, 1] or None, else ValueError."""
    if momentum is not None:
        return fraction("momentum", momentum)
    if debias:
        raise ValueError(
            "A cumulative average has no bias to be rid of. Received: "
            "momentum=None, debias=True. Leave one of them out."
        )
    return None


def checked_axis(axis):
    """`axis` as an int or a list of ints; 1.7 and True raise ValueError."""
    if not isinstance(axis, (tuple, list)):
        return _integer(axis, axis)
    if not axis:
        raise ValueError(
            f"`axis` must name at least one axis. Received: axis={axis!r}."
        )
    axes = [_integer(one, axis) for one in axis]
    return axes if len(axes) > 1 else axes[0]


def _integer(value, axis):
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    whole = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not whole or not float(value).is_integer():
        raise ValueError(
            f"`axis` must be an integer or several. Received: axis={axis!r}."
        )
    return int(value)


def axes_within(axis, input_shape):
    """The axes counted from the front, sorted, checked against the shape."""
    rank = len(input_shape)
    axes = axis if isinstance(axis, list) else [axis]
    if rank < 2:
        raise ValueError(
            "BatchNormalization needs inputs of rank 2 or more: samples and "
            f"channels. Received: input_shape={tuple(input_shape)}."
        )
    for one in axes:
        if not -rank <= one < rank:
            raise ValueError(
                f"Axis {one} is out of bounds for input shape "
                f"{tuple(input_shape)}. Received: axis={axis}. Give an axis "
                f"in [{-rank}, {rank - 1}]."
            )
    within = tuple(sorted({one % rank for one in axes}))
    if len(within) < len(axes):
        raise ValueError(
            "`axis` names the same axis twice. Received: "
            f"axis={axis} for input_shape={tuple(input_shape)}."
        )
    if len(within) == rank:
        raise ValueError(
            "`axis` must leave an axis to take the moments over. Received: "
            f"axis={axis} for input_shape={tuple(input_shape)}."
        )
    return within


def channel_sizes(axis, input_shape):
    """From each channel axis, counted from the front, to its size."""
    sizes = {one: input_shape[one] for one in axes_within(axis, input_shape)}
    if None in sizes.values():
        raise ValueError(
            f"The size of axis {axis}, the channel axis, must be known to "
            "build BatchNormalization. Received: "
            f"input_shape={tuple(input_shape)}. Give the Input that size, or "
            "name another axis."
        )
    return sizes


def refuse_axis_of_samples(axis, input_shape):
    """Raises ValueError where the first axis is a channel axis."""
    if 0 in axes_within(axis, input_shape):
        raise ValueError(
            "With `virtual_batch_size` axis 0 is that of samples, and no "
            f"channel axis. Received: axis={axis} for input_shape="
            f"{tuple(input_shape)}."
        )


def refuse_ragged_ghost_batches(size, shape):
    """Raises ValueError: the rows of ragged inputs are no samples."""
    raise ValueError(
        "Ghost batches are of whole samples, which ragged inputs do not keep "
        f"together. Received: virtual_batch_size={size} and ragged inputs of "
        f"shape {tuple(shape)}. Pad them and give a mask."
    )


def fraction(name, value):
    """`value` as a float in [0, 1], else ValueError."""
    number = _number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(
            f"`{name}` must be in [0, 1]. Received: {name}={value!r}."
        )
    return number


def not_negative(name, value):
    """`value` as a finite float of at least 0, else ValueError."""
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(
            f"`{name}` must be a finite number, not negative. "
            f"Received: {name}={value!r}."
        )
    return number


def _number(name, value):
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number. Received: {name}={value!r}."
        ) from error


def shown(value):
    """`repr(value)` in one line, without its end where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."

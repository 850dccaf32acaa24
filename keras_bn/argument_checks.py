"""What the layer accepts as arguments; one sentence refuses the rest."""

import math
import numbers

import numpy as np


def refuse_reserved(axis_name, virtual_batch_size):
    """Raises ValueError for what a later version will do."""
    reserved = {
        "axis_name": axis_name,
        "virtual_batch_size": virtual_batch_size,
    }
    for name, value in reserved.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is not available in this version of keras_bn. "
                f"Received: {name}={value!r}. Leave it out."
            )


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


def integer_axis(axis):
    """`axis` as an int; 1.7, True and several axes raise ValueError."""
    if isinstance(axis, (tuple, list)):
        raise ValueError(
            "Several channel axes are not available in this version of "
            f"keras_bn. Received: axis={axis!r}. Give one int."
        )
    if isinstance(axis, np.ndarray) and axis.ndim == 0:
        axis = axis.item()
    whole = isinstance(axis, numbers.Real) and not isinstance(axis, bool)
    if not whole or not float(axis).is_integer():
        raise ValueError(f"`axis` must be an integer. Received: axis={axis!r}.")
    return int(axis)


def axis_within(axis, input_shape):
    """`axis` counted from the front, checked against `input_shape`."""
    rank = len(input_shape)
    if rank < 2:
        raise ValueError(
            "BatchNormalization needs inputs of rank 2 or more: samples and "
            f"channels. Received: input_shape={tuple(input_shape)}."
        )
    if not -rank <= axis < rank:
        raise ValueError(
            f"Axis {axis} is out of bounds for input shape "
            f"{tuple(input_shape)}. Received: axis={axis}. Give an axis in "
            f"[{-rank}, {rank - 1}]."
        )
    return axis % rank


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


def checked_clipping(clipping):
    """`clipping` itself; unknown or contradicting bounds raise ValueError."""
    keys = ["rmax", "rmin", "dmax"]
    if set(clipping) - set(keys):
        raise ValueError(
            "Received invalid keys for `renorm_clipping` argument: "
            f"{clipping}. Supported values: {keys}."
        )
    rmax, rmin, dmax = map(clipping.get, keys)
    if rmax is not None and rmin is not None and rmax < rmin:
        raise ValueError(
            "rmax should be greater than rmin in the `renorm_clipping` "
            f"argument. Received: rmax={rmax}, rmin={rmin}."
        )
    if dmax is not None and dmax < 0:
        raise ValueError(
            "dmax should be non-negative in the `renorm_clipping` argument. "
            f"Received: dmax={dmax}."
        )
    return clipping


def _number(name, value):
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number. Received: {name}={value!r}."
        ) from error

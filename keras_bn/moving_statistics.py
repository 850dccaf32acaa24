"""How the moments of a batch become moving statistics."""

from keras import ops


class ExponentialMovingAverage:
    """`moving * momentum + value * (1 - momentum)`, as in Keras.

    A batch in which no position counted (an empty one, or one that is masked
    everywhere) has no moments to give and leaves the average as it is.

    Args:
        momentum: Float in `[0, 1]`, the weight of the past.
    """

    def __init__(self, momentum):
        self.momentum = momentum

    def update(self, variable, value, count):
        """Takes one batch into the average that `variable` holds.

        Args:
            variable: `keras.Variable` of shape `(channels,)`.
            value: Tensor of shape `(channels,)`, the batch's moment.
            count: How many positions the moment was taken over: a number, or
                a tensor of shape `()` or `(channels,)`.
        """
        past = ops.cast(variable, value.dtype)
        average = past * self.momentum + value * (1.0 - self.momentum)
        assign_where_counted(variable, average, count)


def assign_where_counted(variable, value, count):
    """Assigns `value` to `variable` in the channels where `count > 0`."""
    if not isinstance(count, int):
        past = ops.cast(variable, value.dtype)
        value = ops.where(count > 0, value, past)
    elif count == 0:
        return
    variable.assign(value)

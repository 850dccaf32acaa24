"""How the moments of a batch become moving statistics.

Each kind of average says what the past and the new value weigh. A batch in
which no position counted (an empty one, or one that is masked everywhere) has
no moments to give and leaves the average as it is.

Moments are vectors of shape `(channels,)`. A variable may have another shape
of as many elements.
"""

import math

from keras import ops

from keras_bn.dtypes import at_least


class _MovingAverage:
    def update_in_turn(self, variable, values, counts, batches=None):
        """Takes several batches in, one after the other.

        Args:
            variable: As for `update`.
            values: Tensor of shape `(several, channels)`.
            counts: Tensor of shape `(several, 1)` or `(several, channels)`.
            batches: As for `update`, these batches among them.
        """
        counted = ops.broadcast_to(counts > 0, ops.shape(values))
        if self.counts_batches:
            so_far = ops.cumsum(ops.cast(counted, "int32"), axis=0)
            so_far = ops.cast(so_far, values.dtype)
            before = as_vector(batches, values.dtype) - so_far[-1]
            batches = at_least(before + so_far, 1.0)
        past, new = self.weights(batches)
        # How much is kept of what was there before each batch, and at the end
        # of what each batch brings.
        kept = ops.where(counted, past * ops.ones_like(values), 1.0)
        to_the_end = ops.flip(ops.cumprod(ops.flip(kept, 0), axis=0), 0)
        after = ops.concatenate([to_the_end[1:], ops.ones_like(kept[:1])], 0)
        brought = ops.where(counted, values * new * after, 0.0)
        moving = as_vector(variable, values.dtype) * to_the_end[0]
        moving = moving + ops.sum(ops.cast(brought, values.dtype), 0)
        assign_where_counted(variable, moving, ops.max(counts, 0))

    def update(self, variable, value, count, batches=None):
        """Takes one batch into the average that `variable` holds.

        Args:
            variable: `keras.Variable`, one value for each channel.
            value: Tensor of shape `(channels,)`, the batch's moment.
            count: How many positions the moment was taken over: a number, or
                a tensor of shape `()` or `(channels,)`.
            batches: Integer `keras.Variable`, how many batches each channel
                has seen, this one among them; for averages that count them.
        """
        if self.counts_batches:
            # 0 where no batch counted yet, nor does this one.
            batches = at_least(as_vector(batches, value.dtype), 1.0)
        past, new = self.weights(batches)
        moving = as_vector(variable, value.dtype) * past + value * new
        assign_where_counted(variable, moving, count)


class ExponentialMovingAverage(_MovingAverage):
    """`moving * momentum + value * (1 - momentum)`, as in Keras.

    Args:
        momentum: Float in `[0, 1]`, the weight of the past.
    """

    counts_batches = False

    def __init__(self, momentum):
        self.momentum = momentum

    def weights(self, batches):
        """The weights of the past and of the new value; they add up to 1."""
        return self.momentum, 1.0 - self.momentum


class DebiasedMovingAverage(_MovingAverage):
    """An exponential moving average without its initial value.

    The initial value would weigh `momentum ** t` after `t` batches. It is left
    out, and the weights of the batches are scaled up to add up to 1
    (zero-debiasing: Kingma & Ba, 2015, arXiv 1412.6980, section 3).

    Args:
        momentum: Float in `[0, 1]`; 1 gives all batches the same weight, the
            limit of momentums below it.
    """

    counts_batches = True

    def __init__(self, momentum):
        self.momentum = momentum

    def weights(self, batches):
        """As above, after `batches` batches with the new one, a tensor."""
        if self.momentum == 1.0:
            return CumulativeAverage().weights(batches)
        if self.momentum == 0.0:
            return 0.0, 1.0
        # expm1 keeps the digits where the momentum is close to 1, and the
        # same operation above and below makes the first weight 1 exactly.
        log_momentum = math.log(self.momentum)
        new = ops.expm1(ops.full_like(batches, log_momentum)) / ops.expm1(
            batches * log_momentum
        )
        return 1.0 - new, new


class CumulativeAverage(_MovingAverage):
    """The mean of all batches so far, as PyTorch's `momentum=None`."""

    counts_batches = True

    def weights(self, batches):
        """As above, after `batches` batches with the new one, a tensor."""
        new = 1.0 / batches
        return 1.0 - new, new


def moving_average(momentum, debias):
    """The average that the layer's arguments of these names ask for."""
    if momentum is None:
        return CumulativeAverage()
    if debias:
        return DebiasedMovingAverage(momentum)
    return ExponentialMovingAverage(momentum)


def take_in(average, batches, count, moments):
    """Updates moving statistics by one batch, or by several in turn.

    Args:
        average: What weighs the past and the new values.
        batches: Integer `keras.Variable`, how many batches each channel has
            seen; None where the average does not count them.
        count: As for `update`, or for `update_in_turn`.
        moments: Pairs of a variable and the moment that goes into it, of shape
            `(channels,)`, or `(several, channels)`.
    """
    in_turn = len(moments[0][1].shape) == 2
    if average.counts_batches:
        seen = ops.reshape(batches.value, (-1,))
        if in_turn:
            more = ops.sum(ops.cast(count > 0, seen.dtype), 0)
            assign_where_counted(batches, seen + more, ops.max(count, 0))
        else:
            assign_where_counted(batches, seen + ops.ones_like(seen), count)
    update = average.update_in_turn if in_turn else average.update
    for variable, value in moments:
        update(variable, value, count, batches)


def unbiased(variance, count):
    """From the variance divided by N to the one divided by N - 1.

    A variance over one position stays 0, as in TensorFlow 1's fused layer.
    """
    if isinstance(count, int):
        return variance * (count / max(count - 1, 1))
    return variance * (count / ops.maximum(count - 1.0, 1.0))


def as_vector(variable, dtype):
    """The values of `variable` in `dtype`, of shape `(channels,)`."""
    values = ops.cast(variable, dtype)
    return values if len(values.shape) == 1 else ops.reshape(values, (-1,))


def assign_where_counted(variable, value, count):
    """Assigns `value` to `variable` in the channels where `count > 0`."""
    if not isinstance(count, int):
        past = as_vector(variable, value.dtype)
        value = ops.where(count > 0, value, past)
    elif count == 0:
        return
    if len(variable.shape) != 1:
        value = ops.reshape(value, variable.shape)
    variable.assign(value)

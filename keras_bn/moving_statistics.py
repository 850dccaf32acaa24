"""How the moments of a batch become moving statistics.

Each kind of average says what the past and the new value weigh. A batch in
which no position counted (an empty one, or one that is masked everywhere) has
no moments to give and leaves the average as it is.

Moments are vectors of shape `(channels,)`. A variable may have another shape
of as many elements.

Replicas that share out a batch go on with the same statistics: `take_in` sees
to it, also where each normalizes with the moments of its own share.
"""

import math

from keras import ops

from keras_bn.dtypes import at_least


class _MovingAverage:
    def updated_in_turn(self, past, values, counted, batches=None, several=1):
        """Takes several batches in, one after the other.

        Args:
            past: As for `updated`.
            values: Tensor of shape `(rows, channels)`, of a batch each.
            counted: Boolean tensor of that shape, which of them count.
            batches: How many batches each channel has seen, `(channels,)`,
                before these; for averages that count them.
            several: How many batches a row stands for, whose average it is:
                an int, or a tensor of the shape of `values`.
        """
        if self.counts_batches:
            more = ops.where(counted, several * ops.ones_like(values), 0.0)
            so_far = batches + ops.cast(ops.cumsum(more, 0), values.dtype)
            batches = at_least(so_far, 1.0)
        kept, new = self.weights(batches, several)
        # How much is kept of what was there before each batch, and at the end
        # of what each batch brings.
        kept = ops.where(counted, kept * ops.ones_like(values), 1.0)
        to_the_end = ops.flip(ops.cumprod(ops.flip(kept, 0), axis=0), 0)
        after = ops.concatenate([to_the_end[1:], ops.ones_like(kept[:1])], 0)
        brought = ops.where(counted, values * new * after, 0.0)
        brought = ops.sum(ops.cast(brought, values.dtype), 0)
        return past * to_the_end[0] + brought

    def updated(self, past, value, batches=None):
        """The average with one more batch.

        Args:
            past: Tensor of shape `(channels,)`, the average so far.
            value: Tensor of that shape, the batch's moment.
            batches: How many batches each channel has seen, `(channels,)`,
                before this one; for averages that count them.
        """
        if self.counts_batches:
            batches = batches + 1.0
        kept, new = self.weights(batches)
        return past * kept + value * new


class ExponentialMovingAverage(_MovingAverage):
    """`moving * momentum + value * (1 - momentum)`, as in Keras.

    Args:
        momentum: Float in `[0, 1]`, the weight of the past.
    """

    counts_batches = False

    def __init__(self, momentum):
        self.momentum = momentum

    def weights(self, batches, several=1):
        """The weights of the past and of the new value; they add up to 1.

        Args:
            batches: How many batches there are with the new ones, a tensor;
                None where `counts_batches` is False.
            several: How many batches the new value is the average of: an int,
                or an integer tensor.
        """
        if isinstance(several, int):
            kept = self.momentum**several
        else:
            kept = ops.power(self.momentum, several)
        return kept, 1.0 - kept

    def average_of(self, values, counted):
        """What the batches of rows weigh together, without a past."""
        return DebiasedMovingAverage(self.momentum).average_of(values, counted)


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

    def weights(self, batches, several=1):
        """As above."""
        if self.momentum == 1.0:
            return CumulativeAverage().weights(batches, several)
        if self.momentum == 0.0:
            return 0.0, 1.0
        # expm1 keeps the digits where the momentum is close to 1, and the
        # same operation above and below makes the first weight 1 exactly.
        log_momentum = math.log(self.momentum)
        several = several * ops.ones_like(batches)
        new = ops.expm1(several * log_momentum) / ops.expm1(
            batches * log_momentum
        )
        return 1.0 - new, new

    def average_of(self, values, counted):
        """As above."""
        zeros = ops.zeros_like(values[0])
        return self.updated_in_turn(zeros, values, counted, zeros)


class CumulativeAverage(_MovingAverage):
    """The mean of all batches so far, as PyTorch's `momentum=None`."""

    counts_batches = True

    def weights(self, batches, several=1):
        """As above."""
        new = several / batches
        return 1.0 - new, new

    average_of = DebiasedMovingAverage.average_of


def moving_average(momentum, debias):
    """The average that the layer's arguments of these names ask for."""
    if momentum is None:
        return CumulativeAverage()
    if debias:
        return DebiasedMovingAverage(momentum)
    return ExponentialMovingAverage(momentum)


def take_in(updates, count, batches=None, replicas=None, merged=False):
    """Updates moving statistics by one batch, or by several in turn.

    Args:
        updates: List of `(average, variable, value)`: what weighs the past and
            the new, the `keras.Variable` that holds the average, and the
            moment that goes into it, `(channels,)`, or `(rows, channels)` for
            several batches.
        count: How many positions the moments were taken over: an int, or a
            tensor of shape `()` or `(channels,)`; for several batches
            `(rows, 1)` or `(rows, channels)`.
        batches: Integer `keras.Variable`, how many batches each channel has
            seen; for averages that count them.
        replicas: None, or those that go on with the same statistics.
        merged: Whether the batches of all replicas are to be taken in one
            after the other. Else, after each took in its own, the mean of all
            holds, weighted by the count of positions.

    Returns:
        The count of all positions that entered, an int or a tensor.
    """
    averages, variables, values = zip(*updates)
    dtype = values[0].dtype
    pasts = [as_vector(variable, dtype) for variable in variables]
    seen = None if batches is None else as_vector(batches, dtype)
    if len(values[0].shape) == 1:
        more = 1
        news = [
            average.updated(past, value, seen)
            for average, past, value in zip(averages, pasts, values)
        ]
    else:
        several = 1
        counted = ops.broadcast_to(count > 0, ops.shape(values[0]))
        if replicas is not None and merged:
            # A row for each replica: how many batches, and their average.
            several = ops.sum(ops.cast(counted, dtype), 0)
            rows = [a.average_of(v, counted) for a, v in zip(averages, values)]
            several, *values = _gathered(replicas, [several, *rows])
            count, counted = several, several > 0
        count = ops.sum(count, 0)
        more = ops.sum(ops.where(counted, several, 0), 0)
        news = [
            average.updated_in_turn(past, value, counted, seen, several)
            for average, past, value in zip(averages, pasts, values)
        ]
    if replicas is not None and not merged:
        news, more, count = _agreed(replicas, pasts, news, more, count)
    for variable, new in zip(variables, news):
        assign_where_counted(variable, new, count)
    if batches is not None:
        so_far = ops.reshape(batches.value, (-1,))
        so_far = so_far + ops.cast(more, so_far.dtype)
        assign_where_counted(batches, so_far, count)
    return count


def _agreed(replicas, pasts, news, more, count):
    """The mean of what the replicas came to, weighted by their counts."""
    shape, dtype = ops.shape(pasts[0]), pasts[0].dtype
    row = [ops.broadcast_to(ops.cast(x, dtype), shape) for x in (count, more)]
    row += [new - past for past, new in zip(pasts, news)]
    counts, mores, *steps = _gathered(replicas, row)
    count = ops.sum(counts, 0)
    share = counts / at_least(count, 1.0)
    news = [past + ops.sum(share * s, 0) for past, s in zip(pasts, steps)]
    return news, ops.max(mores, 0), count


def _gathered(replicas, vectors):
    """Tensors `(replicas, channels)` from vectors, by one collective."""
    table = replicas.gather(ops.concatenate(vectors))
    return ops.split(table, len(vectors), axis=1)


def unbiased(variance, count):
    """From the variance divided by N to the one divided by N - 1.

    A variance over one position stays 0, as in TensorFlow 1's fused layer.
    """
    if isinstance(count, int):
        return variance * (count / max(count - 1, 1))
    return variance * (count / at_least(count - 1.0, 1.0))


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

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

import numpy as np
from keras import ops

from keras_bn.dtypes import at_least


class _MovingAverage:
    def updated(self, past, value, batches=None):
        """The average with one more batch.

        Args:
            past: Tensor of shape `(channels,)`, the average so far.
            value: Tensor of that shape, the batch's moment.
            batches: How many batches each channel has seen, `(channels,)`,
                before this one; for averages that count them.
        """
        new = self.weight_of_new(batches)
        return past * (1.0 - new) + value * new

    def average_of(self, values, several):
        """The average of rows that are taken in in turn, without a past."""
        none = ops.zeros_like(values[0])
        _, of_rows = self.without_initial.weights(*_in_turn(several), none)
        return ops.sum(values * of_rows, 0)


class ExponentialMovingAverage(_MovingAverage):
    """`moving * momentum + value * (1 - momentum)`, as in Keras.

    Args:
        momentum: Float in `[0, 1]`, the weight of the past.
    """

    counts_batches = False

    def __init__(self, momentum):
        self.momentum = momentum

    @property
    def without_initial(self):
        """The average whose initial value counts for nothing."""
        return DebiasedMovingAverage(self.momentum)

    def weight_of_new(self, batches):
        """What one more batch weighs, the past weighing the rest.

        Args:
            batches: As for `updated`.
        """
        return 1.0 - self.momentum

    def weights(self, several, later, total, batches):
        """What the past weighs and what rows do that are taken in in turn.

        Args:
            several: How many batches each row stands for, whose average it
                is: `(rows, 1)` or `(rows, channels)`; 0 where it does not
                count. An int for a single row, where no batches are counted.
            later: How many follow each row, of that shape.
            total: The sum of `several`.
            batches: As for `updated`.
        """
        return self.kept(total), self.kept(later) * self.brought(several)

    def kept(self, batches):
        """`momentum ** batches`, what so many leave of the past."""
        if isinstance(batches, int):
            return self.momentum**batches
        return ops.power(ops.zeros_like(batches) + self.momentum, batches)

    def brought(self, batches):
        """`1 - momentum ** batches`."""
        known = isinstance(batches, int)
        if self.momentum == 0.0:
            some = batches > 0
            return float(some) if known else ops.cast(some, batches.dtype)
        # expm1 keeps the digits where the momentum is close to 1.
        exponent = batches * math.log(self.momentum)
        return -(math if known else ops).expm1(exponent)


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

    @property
    def without_initial(self):
        """As above."""
        return self

    def weight_of_new(self, batches):
        """As above."""
        if self.momentum == 1.0:
            return CumulativeAverage().weight_of_new(batches)
        # The same operation above and below makes the first weight 1 exactly.
        brought = ExponentialMovingAverage(self.momentum).brought
        return brought(ops.ones_like(batches)) / brought(batches + 1.0)

    def weights(self, several, later, total, batches):
        """As above."""
        if self.momentum == 1.0:
            return CumulativeAverage().weights(several, later, total, batches)
        biased = ExponentialMovingAverage(self.momentum)
        of_past, of_rows = biased.weights(several, later, total, batches)
        # At least one batch, to divide by what is not 0.
        divisor = biased.brought(at_least(batches + total, 1.0))
        return of_past * biased.brought(batches) / divisor, of_rows / divisor


class CumulativeAverage(_MovingAverage):
    """The mean of all batches so far, as PyTorch's `momentum=None`."""

    counts_batches = True

    @property
    def without_initial(self):
        """As above."""
        return self

    def weight_of_new(self, batches):
        """As above."""
        return 1.0 / (batches + 1.0)

    def weights(self, several, later, total, batches):
        """As above."""
        divisor = at_least(batches + total, 1.0)
        return batches / divisor, several / divisor


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
            tensor of shape `()` or `(channels,)`; for several batches a tuple
            of ints, or `(rows, 1)` or `(rows, channels)`.
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
    known = isinstance(count, tuple)
    if known and not (seen is None and replicas is None):
        count, known = ops.convert_to_tensor(_column(count), dtype), False
    if len(values[0].shape) == 1:
        more = 1
        news = [
            average.updated(past, value, seen)
            for average, past, value in zip(averages, pasts, values)
        ]
    elif known:
        weights = {a: _known_weights(a, count, dtype) for a in set(averages)}
        news = []
        for average, past, rows in zip(averages, pasts, values):
            of_past, of_rows = weights[average]
            news.append(past * of_past + ops.sum(rows * of_rows, 0))
        count = sum(count)
    else:
        several = ops.cast(count > 0, dtype)
        if replicas is not None and merged:
            # A row for each replica: how many batches, and their average.
            rows = [a.average_of(v, several) for a, v in zip(averages, values)]
            more = ops.broadcast_to(ops.sum(several, 0), ops.shape(rows[0]))
            several, *values = _gathered(replicas, [more, *rows])
            count = several
        count = ops.sum(count, 0)
        turns = _in_turn(several)
        more = turns[2]
        weights = {a: a.weights(*turns, seen) for a in set(averages)}
        news = []
        for average, past, rows in zip(averages, pasts, values):
            of_past, of_rows = weights[average]
            news.append(past * of_past + ops.sum(rows * of_rows, 0))
    if replicas is not None and not merged:
        news, more, count = _agreed(replicas, pasts, news, more, count)
    for variable, new in zip(variables, news):
        assign_where_counted(variable, new, count)
    if batches is not None:
        so_far = ops.reshape(batches.value, (-1,))
        if not isinstance(more, int):
            more = ops.cast(more, so_far.dtype)
        so_far = so_far + more
        assign_where_counted(batches, so_far, count)
    return count


def _in_turn(several):
    """How many batches each row is, how many follow it, and their total."""
    # float64 would be rounded by PyTorch's `cumsum`; these are small numbers.
    total = ops.sum(several, 0)
    so_far = ops.cast(ops.cumsum(several, 0), several.dtype)
    return several, total - so_far, total


def _known_weights(average, counts, dtype):
    """As `average.weights`, of rows of so many positions each.

    Weights that need no tensors but one: for small batches these operations
    cost more than normalizing does.
    """
    several = [int(count > 0) for count in counts]
    total = sum(several)
    later, of_rows = total, []
    for number in several:
        later -= number
        of_past, of_row = average.weights(number, later, total, None)
        of_rows.append(of_row)
    return of_past, ops.convert_to_tensor(_column(of_rows), dtype)


def _column(values):
    # Not a list, through which Keras looks element by element.
    return np.array([[value] for value in values], "float64")


def _agreed(replicas, pasts, news, more, count):
    """The mean of what the replicas came to, weighted by their counts."""
    shape, dtype = ops.shape(pasts[0]), pasts[0].dtype
    row = [_row(x, shape, dtype) for x in (count, more)]
    row += [new - past for past, new in zip(pasts, news)]
    counts, mores, *steps = _gathered(replicas, row)
    count = ops.sum(counts, 0)
    share = counts / at_least(count, 1.0)
    news = [past + ops.sum(share * s, 0) for past, s in zip(pasts, steps)]
    return news, ops.max(mores, 0), count


def _row(number, shape, dtype):
    """A number or a tensor, for each channel."""
    if isinstance(number, int):
        # PyTorch waits for its device where a number is made a tensor.
        return ops.zeros(shape, dtype) + number
    return ops.broadcast_to(ops.cast(number, dtype), shape)


def _gathered(replicas, vectors):
    """Tensors `(replicas, channels)` from vectors, by one collective."""
    table = replicas.gather(ops.concatenate(vectors))
    return ops.split(table, len(vectors), axis=1)


def unbiased(variance, count):
    """From the variance divided by N to the one divided by N - 1.

    A variance over one position stays 0, as in TensorFlow 1's fused layer.
    `count` is as for `take_in`.
    """
    if isinstance(count, tuple):
        factors = _column(n / max(n - 1, 1) for n in count)
        return variance * ops.convert_to_tensor(factors, variance.dtype)
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

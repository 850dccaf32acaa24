"""The layer in float64 NumPy, written for reading and for nothing else.

Inputs are seen as a matrix of positions and channels. The moving statistics
are computed anew, from all moments that were ever seen, by their closed
formulas; gradients come from complex steps (Squire & Trapp, 1998,
doi:10.1137/S003614459631241X), which are exact to rounding.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Part:
    """A batch, or a ghost batch: `inputs` and `counts` of the same shape.

    Both are matrices, `(positions, channels)`; `counts` is 1 where the
    position enters the moments, else 0.
    """

    inputs: np.ndarray
    counts: np.ndarray

    @property
    def number(self):
        return self.counts.sum(0)

    def moments(self):
        divisor = np.maximum(self.number, 1)
        mean = (self.inputs * self.counts).sum(0) / divisor
        deviation = (self.inputs - mean) * self.counts
        return mean, (deviation**2).sum(0) / divisor


class Average:
    """A moving average for each channel, as a function of its whole past."""

    def __init__(self, initial, momentum, debias=False):
        self.initial = np.array(initial, float)
        self.momentum = momentum
        self.debias = debias
        self.past = [[] for _ in self.initial]

    def take_in(self, values, number):
        for past, value, counted in zip(self.past, values, number > 0):
            if counted:
                past.append(value)

    def value(self):
        return np.array(list(map(self._of_channel, self.initial, self.past)))

    def _of_channel(self, initial, past):
        if not past:
            return initial
        if self.momentum is None:
            return np.mean(past)
        ages = np.arange(len(past))[::-1]
        weights = (1 - self.momentum) * self.momentum**ages
        if self.debias:
            return weights @ past / weights.sum()
        return weights @ past + self.momentum ** len(past) * initial


class LayerInNumPy:
    """`keras_bn.BatchNormalization`, with the arguments that are computed.

    Args:
        gamma: Of shape `(channels,)`, or None; the channels are all indices
            of the channel axes together, in the order of the axes.
        beta: As `gamma`.
        **kwargs: As for the layer. The initial statistics are 0 and 1.
    """

    def __init__(
        self,
        channels,
        gamma=None,
        beta=None,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        renorm=False,
        renorm_clipping=None,
        renorm_momentum=0.99,
        virtual_batch_size=None,
        unbiased_variance=False,
        debias=False,
        use_moving_statistics=None,
        update_moving_statistics=True,
    ):
        self.gamma = np.ones(channels) if gamma is None else gamma
        self.beta = np.zeros(channels) if beta is None else beta
        self.axes = axis if isinstance(axis, (list, tuple)) else [axis]
        self.epsilon = epsilon
        self.renorm = renorm
        self.clipping = renorm_clipping or {}
        self.virtual_batch_size = virtual_batch_size
        self.unbiased_variance = unbiased_variance
        self.use_moving_statistics = use_moving_statistics
        self.update_moving_statistics = update_moving_statistics
        zeros, ones = np.zeros(channels), np.ones(channels)
        self.mean = Average(zeros, momentum, debias)
        # With renorm, of the standard deviation.
        self.spread = Average(ones, momentum, debias)
        self.renorm_mean = Average(zeros, renorm_momentum)
        self.renorm_stddev = Average(ones, renorm_momentum)
        self.moving_variance = ones

    def call(self, inputs, output_gradient, mask=None, training=True):
        """Normalizes a batch and, in training, takes it in.

        Args:
            inputs: Array.
            output_gradient: Array of that shape.
            mask: Boolean array of that rank, broadcastable to it, or None.
            training: Whether it is a training step.

        Returns:
            The outputs, and the gradients of `sum(outputs * output_gradient)`
            for the inputs, gamma and beta.
        """
        counts = np.broadcast_to(True if mask is None else mask, inputs.shape)
        use_moving = self.use_moving_statistics
        if use_moving is None:
            use_moving = not training
        # Of all parts: as they are before the batch.
        moving = (self.mean.value(), self.moving_variance)
        size = training and self.virtual_batch_size or len(inputs)
        results = [
            self._call_on_part(
                *(
                    array[start : start + size]
                    for array in (inputs, counts, output_gradient)
                ),
                moving if use_moving else None,
                training,
            )
            for start in range(0, len(inputs), size)
        ]
        outputs, of_inputs, of_gamma, of_beta = zip(*results)
        return (
            np.concatenate(outputs),
            np.concatenate(of_inputs),
            sum(of_gamma),
            sum(of_beta),
        )

    def statistics(self):
        """From the name of each moving statistic to its value."""
        found = {
            "moving_mean": self.mean.value(),
            "moving_variance": self.moving_variance,
        }
        if self.renorm:
            found["moving_stddev"] = self.spread.value()
            found["renorm_mean"] = self.renorm_mean.value()
            found["renorm_stddev"] = self.renorm_stddev.value()
        return found

    def _call_on_part(self, inputs, counts, output_gradient, moving, training):
        """`moving`: the moments to normalize with; None: the part's own."""
        part = Part(
            self._matrix(inputs).astype(float), self._matrix(counts).astype(int)
        )
        gradient = self._matrix(output_gradient).astype(float)
        correction = 1.0, 0.0
        if self.renorm and training and moving is None:
            correction = self._correction(part)
        corrected = self._corrected(part, moving, correction)
        of_inputs = np.empty(part.inputs.shape)
        step = 1e-30
        for index in np.ndindex(of_inputs.shape):
            nudged = part.inputs.astype(complex)
            nudged[index] += 1j * step
            nudged = Part(nudged, part.counts)
            result = self._corrected(nudged, moving, correction)
            loss = (result * self.gamma * gradient).sum()
            of_inputs[index] = loss.imag / step
        if training and self.update_moving_statistics:
            self._take_in(part)
        return (
            self._like(corrected * self.gamma + self.beta, inputs),
            self._like(of_inputs, inputs),
            (corrected * gradient).sum(0),
            gradient.sum(0),
        )

    def _corrected(self, part, moving, correction):
        mean, variance = moving or part.moments()
        r, d = correction
        return (part.inputs - mean) / np.sqrt(variance + self.epsilon) * r + d

    def _correction(self, part):
        """Batch renormalization's r and d, which count as constants."""
        mean, variance = part.moments()
        stddev = np.sqrt(variance + self.epsilon)
        towards = np.maximum(self.renorm_stddev.value(), np.sqrt(self.epsilon))
        r = np.clip(
            stddev / towards,
            self.clipping.get("rmin", -np.inf),
            self.clipping.get("rmax", np.inf),
        )
        dmax = self.clipping.get("dmax", np.inf)
        d = np.clip((mean - self.renorm_mean.value()) / towards, -dmax, dmax)
        return r, d

    def _take_in(self, part):
        number = part.number
        mean, variance = part.moments()
        if self.renorm:
            self.renorm_mean.take_in(mean, number)
            self.renorm_stddev.take_in(
                np.sqrt(variance + self.epsilon), number
            )
        if self.unbiased_variance:
            variance = variance * number / np.maximum(number - 1, 1)
        self.mean.take_in(mean, number)
        if self.renorm:
            self.spread.take_in(np.sqrt(variance + self.epsilon), number)
            derived = np.maximum(self.spread.value() ** 2 - self.epsilon, 0)
            self.moving_variance = np.where(
                number > 0, derived, self.moving_variance
            )
        else:
            self.spread.take_in(variance, number)
            self.moving_variance = self.spread.value()

    def _order(self, rank):
        channels = sorted(axis % rank for axis in self.axes)
        return [i for i in range(rank) if i not in channels] + channels

    def _matrix(self, array):
        order = self._order(array.ndim)
        return np.transpose(array, order).reshape(-1, len(self.gamma))

    def _like(self, matrix, array):
        """Undoes `_matrix` for what has the shape of `array`."""
        order = self._order(array.ndim)
        moved = matrix.reshape([array.shape[i] for i in order])
        return np.transpose(moved, np.argsort(order))

"""Layers that a study needs and Keras lacks."""

import keras
from keras import ops


class ShiftingNoise(keras.layers.Layer):
    """Undoes the stillness that a normalization gives, in training.

    Multiplies by a deviation and adds a mean that are drawn anew for every
    channel and step, and for every sample around those: Algorithm 1 of
    Santurkar et al. (2018, arXiv 1805.11604), with its values.

    Args:
        seed: int of at least 0.
        **kwargs: those of `keras.layers.Layer`.
    """

    MEAN, DEVIATION, SPREAD = 0.5, 1.25, 0.1

    def __init__(self, seed, **kwargs):
        super().__init__(**kwargs)
        self._generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        if not training:
            return inputs
        channels = inputs.shape[-1]
        of_channels = (1,) * (len(inputs.shape) - 1) + (channels,)
        of_samples = (
            ops.shape(inputs)[0],
            *of_channels[1:-1],
            channels,
        )

        def uniform(shape, low, high):
            return keras.random.uniform(
                shape, low, high, seed=self._generator
            )

        mean = uniform(of_channels, -self.MEAN, self.MEAN)
        # Not in place: the shapes differ.
        mean = mean + uniform(of_samples, -self.SPREAD, self.SPREAD)
        deviation = uniform(of_channels, 1.0, self.DEVIATION)
        spread = keras.random.normal(of_samples, seed=self._generator)
        deviation = deviation + self.SPREAD * spread
        return inputs * deviation + mean


class MomentsPenalty(keras.layers.Layer):
    """Adds a penalty on moments that are not 0 and 1, in training.

    `weight * mean over channels of (mean^2 + (variance - 1)^2)`.

    Args:
        weight: of the penalty.
        **kwargs: those of `keras.layers.Layer`.
    """

    def __init__(self, weight, **kwargs):
        super().__init__(**kwargs)
        self._weight = weight

    def call(self, inputs, training=False):
        if training:
            axes = list(range(len(inputs.shape) - 1))
            mean, variance = ops.moments(inputs, axes)
            off = ops.square(mean) + ops.square(variance - 1.0)
            self.add_loss(self._weight * ops.mean(off))
        return inputs

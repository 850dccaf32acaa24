"""The layers that `fold` puts in where nothing else is left to fold into."""

import keras
from keras import ops

from keras_bn.dtypes import as_floats
from keras_bn.dtypes import moments_dtype


@keras.saving.register_keras_serializable(package="keras_bn")
class ScaleAndShift(keras.layers.Layer):
    """`inputs * scale + shift`: what batch normalization is in inference.

    Args:
        weights_shape: Shape of `scale` and `shift`, which is that of one
            sample, or 1 along some axes.
        **kwargs: Those of `keras.layers.Layer`.

    Inputs: tensor of shape `(samples, ...)`; computed in float32 at least. A
    mask that is given with it is that of the outputs.
    Output shape: that of the inputs, in the compute dtype.
    """

    def __init__(self, weights_shape, **kwargs):
        super().__init__(**kwargs)
        self.weights_shape = tuple(weights_shape)
        self.supports_masking = True

    def build(self, input_shape):
        self.scale = self.add_weight(
            shape=self.weights_shape,
            name="scale",
            initializer="ones",
            autocast=False,
        )
        self.shift = self.add_weight(
            shape=self.weights_shape,
            name="shift",
            initializer="zeros",
            autocast=False,
        )

    def call(self, inputs, mask=None):
        inputs = as_floats(inputs, self.compute_dtype)
        dtype = moments_dtype(inputs.dtype)
        scale, shift = (ops.cast(v, dtype) for v in (self.scale, self.shift))
        outputs = ops.cast(inputs, dtype) * scale + shift
        return ops.cast(outputs, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "weights_shape": self.weights_shape}


@keras.saving.register_keras_serializable(package="keras_bn")
class BorderPadding(keras.layers.Layer):
    """Pads with a value of each channel's own instead of zero.

    Batch normalization before a convolution that pads with zeros is folded
    into it by padding with what would have been normalized to zero.

    Args:
        paddings: Pairs of ints, how much comes before and after, for each axis
            without that of samples; (0, 0) along the channel axis.
        axis: Int, the channel axis, counted without that of samples.
        **kwargs: Those of `keras.layers.Layer`.

    Inputs: tensor of shape `(samples, ...)`, whose channels are known.
    """

    def __init__(self, paddings, axis, **kwargs):
        super().__init__(**kwargs)
        self.paddings = [tuple(pair) for pair in paddings]
        self.axis = axis

    def build(self, input_shape):
        shape = [1] * len(self.paddings)
        shape[self.axis] = input_shape[1 + self.axis]
        self.value = self.add_weight(
            shape=shape, name="value", initializer="zeros"
        )

    def call(self, inputs):
        paddings = [(0, 0), *self.paddings]
        one_channel = [slice(None, None)] * len(paddings)
        one_channel[0] = one_channel[1 + self.axis] = slice(0, 1)
        inside = ops.zeros_like(inputs[tuple(one_channel)])
        border = ops.pad(inside, paddings, constant_values=1)
        return ops.pad(inputs, paddings) + border * ops.cast(
            self.value, inputs.dtype
        )

    def compute_output_shape(self, input_shape):
        samples, *sizes = input_shape
        return (
            samples,
            *(
                None if n is None else before + n + after
                for n, (before, after) in zip(sizes, self.paddings)
            ),
        )

    def get_config(self):
        return {
            **super().get_config(),
            "paddings": self.paddings,
            "axis": self.axis,
        }

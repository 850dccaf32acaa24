"""The algebra of folding into layers that are linear in their inputs.

Kernels are float64 NumPy arrays in Keras's layouts: `(inputs, outputs)` for
Dense, `(*window, inputs per group, outputs)` for Conv, `(*window, inputs,
multiplier)` for DepthwiseConv, `(*window, outputs, inputs)` for ConvTranspose;
output channel `i * multiplier + m` of a depthwise convolution is of input
channel `i`. Each rule returns new arrays.
"""

import dataclasses
import math

import keras
import numpy as np

from keras_bn.surgery.affine import NotExact
from keras_bn.surgery.past_layers import channel_axis
from keras_bn.surgery.past_layers import passes_relu

layers = keras.layers

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_TRANSPOSE = (
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)
LINEAR_LAYERS = (
    layers.Dense,
    *_CONVOLUTIONS,
    *_DEPTHWISE,
    *_SEPARABLE,
    *_TRANSPOSE,
)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer's weights, and what it pads its inputs with.

    Attributes:
        layer: The `keras.layers.Layer`.
        kernels: From the names of its kernels to float64 arrays.
        bias: float64 array `(outputs,)`.
        border: None, or the float64 array `(inputs,)` of what stands around
            the inputs instead of zeros.
    """

    layer: keras.layers.Layer
    kernels: dict
    bias: np.ndarray
    border: np.ndarray | None = None

    def after_outputs(self, scale, shift):
        """With `outputs * scale + shift` as outputs.

        Args:
            scale, shift: Arrays `(outputs,)`.

        Raises:
            NotExact: the layer is not linear up to its outputs, and they are
                not just made larger or smaller behind a ReLU.
        """
        if self.layer.activation not in (None, keras.activations.linear) and (
            self.layer.activation is not keras.activations.relu
            or not passes_relu(scale, shift)
        ):
            raise NotExact(
                f"the activation of {self.layer.name!r} comes between"
            )
        kernels = dict(self.kernels)
        (*_, name) = kernels
        kernel = kernels[name]
        kind = type(self.layer)
        if kind in _TRANSPOSE:
            kernels[name] = kernel * scale[:, None]
        elif kind in _DEPTHWISE:
            kernels[name] = kernel * scale.reshape(kernel.shape[-2:])
        else:
            kernels[name] = kernel * scale
        return dataclasses.replace(
            self, kernels=kernels, bias=self.bias * scale + shift
        )

    def before_inputs(self, scale, shift):
        """With `inputs * scale + shift` as inputs.

        Where the layer pads its inputs, `border` becomes what is mapped to
        what it is now.

        Args:
            scale, shift: Arrays `(inputs,)`.

        Raises:
            NotExact: no weights give the same outputs.
        """
        kernels = dict(self.kernels)
        name = next(iter(kernels))
        kernel = kernels[name]
        kind = type(self.layer)
        border = self.border
        if np.any(shift != 0.0):
            if kind in _TRANSPOSE:
                raise NotExact(
                    f"outputs of {self.layer.name!r} are not all of the same "
                    "weights"
                )
            if self._pads():
                border = preimage(
                    np.zeros_like(shift) if border is None else border,
                    scale,
                    shift,
                )
        elif border is not None:
            border = preimage(border, scale, shift)
        if kind in _CONVOLUTIONS:
            groups = self.layer.groups
            scale, shift = (
                _of_each_output(x, kernel.shape[-1], groups)
                for x in (scale, shift)
            )
        elif kind in _TRANSPOSE:
            scale, shift = scale, np.zeros_like(scale)
        else:
            scale, shift = scale[:, None], shift[:, None]
        window = tuple(range(kernel.ndim - 2))
        # What the shift adds, for each input and output.
        added = kernel.sum(window) * shift
        kernels[name] = kernel * scale
        if kind in _SEPARABLE:
            (pointwise,) = list(self.kernels.values())[1:]
            added = added.reshape(-1) @ pointwise.reshape(
                -1, pointwise.shape[-1]
            )
        elif kind in _DEPTHWISE:
            added = added.reshape(-1)
        elif kind in _TRANSPOSE:
            added = 0.0
        else:
            added = added.sum(0)
        return dataclasses.replace(
            self, kernels=kernels, bias=self.bias + added, border=border
        )

    def _pads(self):
        return (
            type(self.layer) is not layers.Dense
            and self.layer.padding != "valid"
            and any(n > 1 for n in self.layer.kernel_size)
        )

    def check_range(self):
        """Raises NotExact where a weight does not fit the layer's dtype."""
        values = [*self.kernels.values(), self.bias]
        if self.border is not None:
            values.append(self.border)
        check_range(self.layer, *values)


def linear_of(layer):
    """The `Linear` of a layer of a type in `LINEAR_LAYERS`.

    Raises:
        NotExact: its weights are not those of a plain layer.
    """
    if getattr(layer, "quantization_mode", None) is not None:
        raise NotExact(f"{layer.name!r} is quantized")
    if getattr(layer, "lora_enabled", False):
        raise NotExact(f"{layer.name!r} has LoRA weights")
    names = ["kernel"]
    if type(layer) in _SEPARABLE:
        names = ["depthwise_kernel", "pointwise_kernel"]
    kernels = {name: in_float64(getattr(layer, name)) for name in names}
    if layer.use_bias:
        bias = in_float64(layer.bias)
    else:
        bias = np.zeros(_outputs(layer, kernels))
    return Linear(layer, kernels, bias)


def in_float64(weight):
    """A weight as a float64 array."""
    # NumPy has no bfloat16.
    if keras.backend.standardize_dtype(weight.dtype) == "bfloat16":
        weight = keras.ops.cast(weight, "float32")
    return np.asarray(keras.ops.convert_to_numpy(weight), "float64")


def preimage(border, scale, shift):
    """What is mapped to `border`: `(border - shift) / scale`.

    Raises:
        NotExact: nothing is, as the scale is zero.
    """
    if np.any((scale == 0.0) & (border != shift)):
        raise NotExact(
            "gamma is zero in some channels, and no padding of theirs is "
            "mapped to 0"
        )
    # Where all is mapped to the border, zero is as well.
    divisor = np.where(scale == 0.0, 1.0, scale)
    return np.where(scale == 0.0, 0.0, (border - shift) / divisor)


def check_range(layer, *arrays):
    """Raises NotExact where a value does not fit the layer's dtype."""
    # NumPy has no bfloat16, whose range is that of float32.
    dtype = {"float16": "float16", "float64": "float64"}.get(
        layer.compute_dtype, "float32"
    )
    largest = max(np.max(np.abs(x), initial=0.0) for x in arrays)
    if not largest <= np.finfo(dtype).max:
        raise NotExact(f"weights of {layer.name!r} would be out of range")


def padding_at_border(layer, shape):
    """What the layer pads its inputs with, for each axis of a sample.

    Args:
        layer: A convolution with padding "same" or "causal".
        shape: Of a sample of its inputs.

    Raises:
        NotExact: it depends on a size that is not known.
    """
    rank = len(shape)
    axis = channel_axis(layer, rank)
    sizes = [n for i, n in enumerate(shape) if i != axis]
    paddings = []
    for size, window, stride, dilation in zip(
        sizes,
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        strict=True,
    ):
        reach = (window - 1) * dilation
        if layer.padding == "causal":
            paddings.append((reach, 0))
            continue
        if stride > 1 and reach > 0:
            if size is None:
                raise NotExact(
                    f"the padding of {layer.name!r} depends on a size that is "
                    "not known"
                )
            last = (math.ceil(size / stride) - 1) * stride
            reach = max(last + reach + 1 - size, 0)
        paddings.append((reach // 2, reach - reach // 2))
    paddings.insert(axis, (0, 0))
    return paddings


def _outputs(layer, kernels):
    (*_, kernel) = kernels.values()
    if type(layer) in _TRANSPOSE:
        return kernel.shape[-2]
    if type(layer) in _DEPTHWISE:
        return math.prod(kernel.shape[-2:])
    return kernel.shape[-1]


def _of_each_output(vector, outputs, groups):
    """`(inputs per group, outputs)`: which input each kernel entry takes."""
    return np.repeat(vector.reshape(groups, -1).T, outputs // groups, axis=1)

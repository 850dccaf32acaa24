"""Past which layers batch normalization can be moved, and as what.

Each rule is exact in inference. Shapes are of samples, without the batch.
"""

import keras
import numpy as np

from keras_bn.surgery.affine import Affine
from keras_bn.surgery.affine import NotExact
from keras_bn.surgery.affine import reshaped
from keras_bn.surgery.affine import transposed

layers = keras.layers

# They do nothing in inference.
_IDENTITIES = (
    layers.ActivityRegularization,
    layers.AlphaDropout,
    layers.Dropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
)
# Weighted means of positions, of weights that sum to 1, and selections.
_MEANS = (
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
)
_MAXIMA = (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)
_GLOBAL_MEANS = (
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
)
_GLOBAL_MAXIMA = (
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
)
ZERO_PADDINGS = (
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
)


def moved_after(layer, affine, before, after):
    """What follows `layer` instead of `affine` in front of it.

    Args:
        layer: `keras.layers.Layer`.
        affine: `Affine` of the layer's inputs.
        before, after: Shapes of its inputs and outputs.

    Returns:
        `Affine` of its outputs.

    Raises:
        NotExact: there is none that gives the same outputs.
    """
    kind = type(layer)
    if _is_identity(layer):
        return affine
    if kind in (*_MEANS, *_MAXIMA):
        check_positions(layer, affine)
        return affine
    if kind in (*_GLOBAL_MEANS, *_GLOBAL_MAXIMA):
        check_positions(layer, affine)
        return _resized(affine, (-1,) + (1,) * (len(after) - 1), layer)
    if kind is layers.Flatten:
        return reshaped(*_channels_last(layer, affine, before), after)
    if kind is layers.Reshape:
        return reshaped(affine, before, after)
    if kind is layers.Permute:
        return transposed(affine, [axis - 1 for axis in layer.dims])
    raise NotExact(f"{_named(layer)} comes after it")


def moved_before(layer, affine, before, after):
    """What precedes `layer` instead of `affine` behind it.

    Arguments, results and errors as for `moved_after`, the other way round.
    """
    kind = type(layer)
    if _is_identity(layer):
        return affine
    if _is_relu(layer) and passes_relu(affine.scale, affine.shift):
        return affine
    if kind in (*_MEANS, *_MAXIMA):
        check_positions(layer, affine)
        return affine
    if kind in (*_GLOBAL_MEANS, *_GLOBAL_MAXIMA):
        shape = [1] * len(before)
        shape[channel_axis(layer, len(before))] = -1
        if not layer.keepdims:
            affine = _resized(affine, shape, layer)
        check_positions(layer, affine)
        return affine
    if kind in ZERO_PADDINGS:
        if np.any(affine.shift != 0.0):
            raise NotExact(f"{_named(layer)} before it pads with zeros")
        check_positions(layer, affine)
        return affine
    if kind is layers.Flatten and layer.data_format == "channels_last":
        return reshaped(affine, after, before)
    if kind is layers.Reshape:
        return reshaped(affine, after, before)
    if kind is layers.Permute:
        return transposed(affine, np.argsort(layer.dims))
    raise NotExact(f"{_named(layer)} comes before it")


def channel_axis(layer, rank):
    """The layer's channel axis in samples of a rank."""
    first = getattr(layer, "data_format", None) == "channels_first"
    return 0 if first else rank - 1


def paddings_of(layer, rank):
    """List of the zeros before and after, for each axis of a sample."""
    padding = layer.padding
    if type(layer) is layers.ZeroPadding1D:
        padding = [padding]
    padding = [tuple(pair) for pair in padding]
    padding.insert(channel_axis(layer, rank), (0, 0))
    return padding


def _is_identity(layer):
    return type(layer) in _IDENTITIES or (
        type(layer) is layers.Activation
        and layer.activation is keras.activations.linear
    )


def passes_relu(scale, shift):
    """Whether `relu(x) * scale + shift` is `relu(x * scale)`."""
    return np.all(scale > 0.0) and np.all(shift == 0.0)


def _is_relu(layer):
    if type(layer) is layers.Activation:
        return layer.activation is keras.activations.relu
    return type(layer) is layers.LeakyReLU or (
        type(layer) is layers.ReLU
        and layer.max_value is None
        and layer.threshold == 0.0
    )


def check_positions(layer, affine):
    """Raises NotExact where a layer over positions does not commute."""
    axis = channel_axis(layer, affine.scale.ndim)
    if np.any(np.delete(affine.scale.shape, axis) != 1):
        raise NotExact(f"it depends on the position in {_named(layer)}")
    if getattr(layer, "interpolation", "nearest") not in (
        "nearest",
        "bilinear",
    ):
        raise NotExact(
            f"{_named(layer)} interpolates by weights whose sum is not 1"
        )
    if type(layer) in (*_MAXIMA, *_GLOBAL_MAXIMA) and np.any(
        affine.scale < 0.0
    ):
        count = np.count_nonzero(affine.scale < 0.0)
        raise NotExact(
            f"gamma is negative in {count} of {affine.scale.size} channels "
            f"and {_named(layer)} takes maxima"
        )


def _resized(affine, shape, layer):
    if getattr(layer, "keepdims", False):
        return affine
    return Affine(affine.scale.reshape(shape), affine.shift.reshape(shape))


def _channels_last(layer, affine, shape):
    if layer.data_format == "channels_first" and len(shape) > 1:
        order = [*range(1, len(shape)), 0]
        return transposed(affine, order), [shape[i] for i in order]
    return affine, shape


def _named(layer):
    return f"{type(layer).__name__} {layer.name!r}"

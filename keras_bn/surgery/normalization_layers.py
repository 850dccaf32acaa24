"""How one normalization layer takes the place of another."""

import keras
import numpy as np

from keras_bn.layer import BatchNormalization
from keras_bn.surgery.cloning import copied

_GAMMA_AND_BETA = (
    "epsilon",
    "center",
    "scale",
    "beta_initializer",
    "gamma_initializer",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
)
_BATCH_NORMALIZATION = (
    *_GAMMA_AND_BETA,
    "axis",
    "momentum",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
    "synchronized",
)
_WEIGHTS = (
    "gamma",
    "beta",
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
    "num_batches_tracked",
    "renorm_step",
)
# The paper's number of groups.
_GROUPS = 32


def to_ours(layer):
    """`keras_bn.BatchNormalization` for one built into Keras."""
    return BatchNormalization(
        **_arguments(layer, _BATCH_NORMALIZATION), **_of_every_layer(layer)
    )


def to_keras(layer):
    """`keras.layers.BatchNormalization` for one of ours.

    Raises:
        ValueError: inference would not be the same.
    """
    if isinstance(layer.axis, list):
        raise ValueError(
            "keras.layers.BatchNormalization has one channel axis. Received: "
            f"layer {layer.name!r} with axis={layer.axis}."
        )
    if layer.use_moving_statistics is False:
        raise ValueError(
            "keras.layers.BatchNormalization cannot use the batch's moments "
            f"in inference. Received: layer {layer.name!r} with "
            "use_moving_statistics=False. Set it to None first."
        )
    arguments = _arguments(layer, _BATCH_NORMALIZATION)
    for name in lost_in_keras(layer):
        if name in arguments:
            del arguments[name]
    return keras.layers.BatchNormalization(
        **arguments, **_of_every_layer(layer)
    )


def lost_in_keras(layer):
    """Names of the options that act in training and Keras's layer lacks."""
    lost = [
        name
        for name, default in (
            ("virtual_batch_size", None),
            ("unbiased_variance", False),
            ("debias", False),
            ("use_moving_statistics", None),
            ("update_moving_statistics", True),
            ("train_gamma_and_beta", True),
        )
        if getattr(layer, name) != default
    ]
    if layer.momentum is None:
        lost.append("momentum")
    if layer.synchronized and keras.backend.backend() != "tensorflow":
        lost.append("synchronized")
    if layer.renorm and layer.renorm_step is not None:
        lost.append("renorm_clipping")
    return lost


def to_group_normalization(layer):
    """`keras.layers.GroupNormalization` (Wu & He, 2018, arXiv 1803.08494).

    With the paper's 32 groups, or the largest number below that divides the
    channels.
    """
    channels = layer.moving_mean.shape[0]
    groups = max(g for g in range(1, _GROUPS + 1) if channels % g == 0)
    return _group_normalization(layer, groups)


def to_instance_normalization(layer):
    """A group for each channel (Ulyanov et al., 2016, arXiv 1607.08022)."""
    return _group_normalization(layer, -1)


def to_layer_normalization(layer):
    """`keras.layers.LayerNormalization` (Ba et al., 2016, arXiv 1607.06450).

    Over the channels of each position.
    """
    return keras.layers.LayerNormalization(
        axis=_one_axis(layer),
        **_arguments(layer, _GAMMA_AND_BETA),
        **_of_every_layer(layer),
    )


def copy_weights(old, new):
    """Copies the weights that both have, by name.

    Raises:
        ValueError: one has another size.
    """
    for name in _WEIGHTS:
        weight, other = (getattr(x, name, None) for x in (old, new))
        if weight is None or other is None:
            continue
        values = copied(weight)
        if values.size != np.prod(other.shape, dtype=int):
            raise ValueError(
                f"`convert` keeps {name}, of as many values as before. "
                f"Received: layer {new.name!r} of type {type(new).__name__} "
                f"with {name} of shape {tuple(other.shape)}, instead of "
                f"{values.shape}."
            )
        other.assign(values.reshape(other.shape))


def _group_normalization(layer, groups):
    return keras.layers.GroupNormalization(
        groups=groups,
        axis=_one_axis(layer),
        **_arguments(layer, _GAMMA_AND_BETA),
        **_of_every_layer(layer),
    )


def _one_axis(layer):
    """Counted from the front; the last one as -1."""
    if isinstance(layer.axis, list):
        raise ValueError(
            "GroupNormalization and LayerNormalization have one channel axis. "
            f"Received: layer {layer.name!r} with axis={layer.axis}."
        )
    rank = layer.input_spec.ndim
    axis = layer.axis % rank
    return -1 if axis == rank - 1 else axis


def _arguments(layer, names):
    return {name: getattr(layer, name) for name in names}


def _of_every_layer(layer):
    return {
        "name": layer.name,
        "trainable": layer.trainable,
        "dtype": layer.dtype_policy,
    }

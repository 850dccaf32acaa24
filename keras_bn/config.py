"""The layer's config: what it was built with, as `from_config` takes it."""

import keras

from keras_bn.renormalization import serialized_clipping

_OF_KERAS = (
    "axis",
    "momentum",
    "epsilon",
    "center",
    "scale",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
    "synchronized",
)
# Keras's layer is built from a config that has none of these: only what
# differs from its default is written.
_BEYOND_KERAS = {
    "axis_name": None,
    "virtual_batch_size": None,
    "unbiased_variance": False,
    "debias": False,
    "use_moving_statistics": None,
    "update_moving_statistics": True,
    "train_gamma_and_beta": True,
}


def config_of(layer):
    """Dictionary of the layer's arguments, without those of every layer."""
    config = {name: getattr(layer, name) for name in _OF_KERAS}
    if layer.renorm:
        config["renorm_clipping"] = serialized_clipping(layer.renorm_clipping)
    for name, default in _BEYOND_KERAS.items():
        if getattr(layer, name) != default:
            config[name] = getattr(layer, name)
    for weight in ("beta", "gamma", "moving_mean", "moving_variance"):
        name = f"{weight}_initializer"
        config[name] = keras.initializers.serialize(getattr(layer, name))
    for weight in ("beta", "gamma"):
        name = f"{weight}_regularizer"
        config[name] = keras.regularizers.serialize(getattr(layer, name))
        name = f"{weight}_constraint"
        config[name] = keras.constraints.serialize(getattr(layer, name))
    return config

"""The batch normalization in a model, of ours or built into Keras."""

import keras

from keras_bn.layer import BatchNormalization

BATCH_NORMALIZATIONS = (BatchNormalization, keras.layers.BatchNormalization)


def batch_normalizations(caller, model):
    """List of the batch-normalization layers at any depth of a model.

    In nested models, custom layers and wrappers, each once.

    Args:
        caller: Name of the function that says no.
        model: `keras.Model` or layer.

    Raises:
        ValueError: `model` is no model or layer, or holds no batch
            normalization.
    """
    if not isinstance(model, keras.layers.Layer):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        kind = kind.removeprefix("builtins.")
        advice = ""
        if kind.startswith("tf_keras"):
            advice = " `keras_bn.convert` makes one of it."
        raise ValueError(
            f"`{caller}` takes a keras.Model or a layer of Keras 3. "
            f"Received: model of type {kind}.{advice}"
        )
    layers = [
        x
        for x in model._flatten_layers()
        if isinstance(x, BATCH_NORMALIZATIONS)
    ]
    if not layers:
        raise ValueError(
            f"`{caller}` found no batch normalization. "
            f"Received: model={model!r}. Give a model that has some."
        )
    return layers


def built_batch_normalizations(caller, model):
    """The same where the layers have to be built.

    Raises:
        ValueError: as above; or a layer has no weights yet, or the model was
            not built.
    """
    layers = batch_normalizations(caller, model)
    for layer in layers:
        if not layer.built:
            raise ValueError(
                f"`{caller}` needs a model that is built. Received: layer "
                f"{layer.name!r} without weights. Call the model on a batch "
                "first, or `model.build(input_shape)`."
            )
    if not model.built:
        raise ValueError(
            f"`{caller}` needs a model that is built. Received: "
            f"model={model!r}. Call the model on a batch first."
        )
    return layers

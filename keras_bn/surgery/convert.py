"""Replaces the batch normalization in a model by another layer."""

import inspect
import os
import warnings

import keras
import numpy as np

from keras_bn.layer import BatchNormalization
from keras_bn.model_layers import BATCH_NORMALIZATIONS
from keras_bn.model_layers import built_batch_normalizations
from keras_bn.surgery.cloning import ModelCloner
from keras_bn.surgery.cloning import copy_compiled
from keras_bn.surgery.cloning import copy_own_state
from keras_bn.surgery.cloning import copy_trainable
from keras_bn.surgery.linear_layers import in_float64
from keras_bn.surgery.normalization_layers import copy_weights
from keras_bn.surgery.normalization_layers import lost_in_keras
from keras_bn.surgery.normalization_layers import to_group_normalization
from keras_bn.surgery.normalization_layers import to_instance_normalization
from keras_bn.surgery.normalization_layers import to_keras
from keras_bn.surgery.normalization_layers import to_layer_normalization
from keras_bn.surgery.normalization_layers import to_ours
from keras_bn.surgery.tf_keras_models import from_tf_keras
from keras_bn.surgery.tf_keras_models import is_tf_keras_model

_BY_NAME = {
    "group": to_group_normalization,
    "instance": to_instance_normalization,
    "layer": to_layer_normalization,
}


def convert(model, to=BatchNormalization):
    """Makes the model anew, with another layer for batch normalization.

    Between `keras.layers.BatchNormalization` and ours every weight keeps its
    value, and training and inference are the same. In a custom layer the parts
    that are in its config are replaced.

    Args:
        model: Functional or Sequential `keras.Model` that is built; nested
            models, shared layers, several inputs and outputs included. It is
            left as it is. A model of tf-keras (Keras 2) too, or the path of an
            .h5 or .keras file, also one that tf-keras wrote: what it was
            compiled with stays behind. Batch normalization of its rank 4 and 5
            gets `unbiased_variance=True`, as its fused operation, which is
            the default there, acts so.
        to: What takes the place of each batch normalization:
            `keras_bn.BatchNormalization` (default) or
            `keras.layers.BatchNormalization`; `"group"`, `"layer"` or
            `"instance"`: Keras's `GroupNormalization` with 32 groups, or the
            largest number below that divides the channels,
            `LayerNormalization` over the channels, or `GroupNormalization`
            with a group for each channel, all of which keep gamma, beta and
            epsilon; or a function from a batch-normalization layer to a new
            layer with outputs of the same shape, which gets `trainable` and
            the weights that have the same names.

    Returns:
        `keras.Model` with weights of its own, names and graph as before,
        compiled as the model is, with the same state of the optimizer where
        the trainable weights are of the same shapes.

    Raises:
        ValueError: the model is not built, has no batch normalization or is
            subclassed; a layer cannot be cloned or makes batch normalization
            in its own code; moving statistics that would be kept are not
            finite; Keras's layer cannot do in inference what ours does; `to`
            is none of the above, or returns what is no new layer or does not
            fit there. What `to` itself raises is not caught.

    Warns:
        UserWarning: options of ours that act in training are lost in Keras's
            layer.
    """
    make = _maker(to)
    if isinstance(model, (str, os.PathLike)) or is_tf_keras_model(model):
        model = from_tf_keras(model)
    layers = built_batch_normalizations("convert", model)
    wanted = [layer for layer in layers if _is_wanted(layer, to)]
    if to in BATCH_NORMALIZATIONS:
        for layer in wanted:
            refuse_infinite_weights("convert", layer)
    replaced = {}

    def instead_of(layer):
        if not isinstance(layer, BATCH_NORMALIZATIONS) or not _is_wanted(
            layer, to
        ):
            return None
        replaced[id(layer)] = make(layer)
        return [replaced[id(layer)]]

    cloner = ModelCloner(
        "convert",
        instead_of,
        keep_class=True,
        rewrite=lambda config: _rewritten(config, to, make),
    )
    try:
        new = cloner.clone(model)
    finally:
        # Where Keras raises something, it may be because of this.
        for layer in layers:
            if id(layer) in replaced:
                _check_shapes(layer, replaced[id(layer)])
    for layer in layers:
        if id(layer) in replaced:
            copy_weights(layer, replaced[id(layer)])
    parts = [
        pair
        for old, clone in cloner.clones
        for pair in _copy_with_parts(old, clone, old, to)
    ]
    if to is keras.layers.BatchNormalization:
        _warn_of_lost(wanted)
    pairs = [
        *cloner.models,
        *parts,
        *((x, replaced[id(x)]) for x in layers if id(x) in replaced),
    ]
    copy_trainable(model, new, pairs)
    for old, clone in cloner.models:
        copy_compiled(old, clone)
    return new


def refuse_infinite_weights(caller, layer):
    """Raises ValueError where a weight of the layer is NaN or infinite."""
    for weight in layer.weights:
        if not np.all(np.isfinite(in_float64(weight))):
            raise ValueError(
                f"`{caller}` needs finite weights in batch normalization. "
                f"Received: layer {layer.name!r} with {weight.name} not "
                "finite. `keras_bn.recalibrate(model, data)` computes moving "
                "statistics anew."
            )


def _maker(to):
    if isinstance(to, str) and to in _BY_NAME:
        return _BY_NAME[to]
    if to is BatchNormalization:
        return to_ours
    if to is keras.layers.BatchNormalization:
        return to_keras
    if not _is_function_of_a_layer(to):
        raise ValueError(
            "`to` must be keras_bn.BatchNormalization, "
            "keras.layers.BatchNormalization, 'group', 'layer', 'instance' or "
            f"a function of a layer. Received: to={to!r}.{_advice(to)}"
        )
    made = []

    def made_by_function(layer):
        new = to(layer)
        if not isinstance(new, keras.layers.Layer):
            raise ValueError(
                "`to` must return a new layer. Received: "
                f"{new!r} for layer {layer.name!r}."
            )
        if new._inbound_nodes or any(new is one for one in (layer, *made)):
            raise ValueError(
                "`to` must return a new layer each time. Received: "
                f"{new!r} for layer {layer.name!r}, which is in use already."
            )
        made.append(new)
        return new

    return made_by_function


def _is_function_of_a_layer(to):
    if isinstance(to, (str, type, keras.layers.Layer)) or not callable(to):
        return False
    try:
        inspect.signature(to).bind("layer")
    except TypeError:
        return False
    except ValueError:
        # Some that are written in C do not show what they take.
        return True
    return True


def _advice(to):
    kind = to if isinstance(to, type) else type(to)
    if not issubclass(kind, keras.layers.Layer):
        return ""
    name = kind.__name__
    if kind is BatchNormalization:
        name = f"keras_bn.{name}"
    elif kind.__module__.startswith("keras.src.layers."):
        name = f"keras.layers.{name}"
    return (
        f" Each place gets a layer of its own: `to=lambda layer: {name}(...)`."
    )


def _check_shapes(layer, new):
    """Raises ValueError for a layer whose outputs are not as its inputs."""
    for node in new._inbound_nodes:
        inputs, *_ = node.input_tensors
        found = [tuple(x.shape) for x in node.outputs]
        if len(found) != 1 or not _same_shape(found[0], inputs.shape):
            raise ValueError(
                "`to` must return a layer with outputs of the shape of its "
                f"inputs. Received: {new!r} for layer {layer.name!r}, with "
                f"outputs of shape {', '.join(map(str, found))} for inputs of "
                f"shape {inputs.shape}."
            )


def _same_shape(one, other):
    return len(one) == len(other) and all(
        None in (a, b) or a == b for a, b in zip(one, other)
    )


def _is_wanted(layer, to):
    """Whether the layer is of another kind than `to`.

    Raises:
        ValueError: the layer is of a class derived from batch normalization.
    """
    if type(layer) not in BATCH_NORMALIZATIONS and (
        isinstance(to, (str, type))
    ):
        raise ValueError(
            "`convert` knows keras_bn.BatchNormalization and "
            "keras.layers.BatchNormalization, and no class derived from them. "
            f"Received: layer {layer.name!r} of type {type(layer).__name__}. "
            "Give a function as `to`."
        )
    return type(layer) is not to


def _rewritten(config, to, make):
    """The config of a layer, with other normalization in its parts."""
    if isinstance(config, dict):
        if config.get("class_name") == "BatchNormalization":
            layer = keras.saving.deserialize_keras_object(config)
            if isinstance(layer, BATCH_NORMALIZATIONS) and _is_wanted(
                layer, to
            ):
                return keras.saving.serialize_keras_object(make(layer))
        return {k: _rewritten(v, to, make) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_rewritten(v, to, make) for v in config)
    return config


def _copy_with_parts(old, new, owner, to):
    """Copies the weights of a layer and its parts, some of them replaced.

    Returns:
        List of pairs: the layer and its parts with those of the new layer.
    """
    if isinstance(old, BATCH_NORMALIZATIONS) and _is_wanted(old, to):
        if type(new) is type(old):
            raise ValueError(
                "`convert` cannot replace what a layer makes in its own code. "
                f"Received: layer {owner.name!r} of type "
                f"{type(owner).__name__}, with {old.name!r} in it. Change the "
                "class, or have its config hold that layer."
            )
        copy_weights(old, new)
        return [(old, new)]
    copy_own_state(old, new)
    pairs = [(old, new)]
    for part, clone in zip(old._layers, new._layers, strict=True):
        pairs += _copy_with_parts(part, clone, owner, to)
    return pairs


def _warn_of_lost(layers):
    lost = {
        layer.name: names
        for layer in layers
        if (names := lost_in_keras(layer))
    }
    if lost:
        warnings.warn(
            "keras.layers.BatchNormalization lacks options that act in "
            f"training, and `convert` left them out: {lost}.",
            stacklevel=3,
        )

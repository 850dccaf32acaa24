"""Reads models of tf-keras (Keras 2) as models of Keras 3, with our layer.

TensorFlow need not be installed to read their files.
"""

import collections
import json
import os
import pathlib
import tempfile
import zipfile

import h5py
import keras
import numpy as np
from keras.src.utils.naming import to_snake_case

from keras_bn.layer import BatchNormalization
from keras_bn.surgery.cloning import is_graph
from keras_bn_checks import LARGEST_TEXT
from keras_bn_checks import json_member

_CLASSES = (
    "BatchNormalization",
    "BatchNormalizationV1",
    "SyncBatchNormalization",
)
_RECURRENT = ("GRU", "LSTM", "RNN", "SimpleRNN", "Bidirectional")
_NOT_HERE = ("adjustment", "fused")


def is_tf_keras_model(model):
    """Whether it is a model object of tf-keras."""
    return any(
        one.__module__.split(".")[0] == "tf_keras"
        for one in type(model).__mro__
    )


def is_tf_keras_file(path):
    """Whether it is an .h5 or .keras file of a model that tf-keras wrote."""
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                version = file["model_weights"].attrs["keras_version"]
        else:
            version = json_member(path, "metadata.json")["keras_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return _text(version).startswith("2.")


def from_tf_keras(model):
    """The same as a model of Keras 3.

    Batch normalization is ours, with `unbiased_variance=True` where tf-keras
    takes its fused operation by default, as files do not say more. A list of
    axes and `virtual_batch_size` stay, whose parts are not the same samples.

    Args:
        model: Model object of tf-keras, or path of an .h5 or .keras file that
            it wrote; of a file that Keras 3 wrote too.

    Returns:
        `keras.Model`, not compiled if the model is of tf-keras.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(model, (str, os.PathLike)):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.h5"
            try:
                model.save(path, include_optimizer=False, save_format="h5")
            except Exception as error:
                raise _unreadable(f"model {model.name!r}", error) from error
            return _read_h5(path)
    path = pathlib.Path(model)
    if not path.is_file():
        raise ValueError(f"`convert` found no such file. Received: {path}.")
    if is_tf_keras_file(path):
        read = _read_h5 if h5py.is_hdf5(path) else _read_archive
        try:
            return read(path)
        except (
            AttributeError,  # a group where a dataset should be
            KeyError,
            TypeError,
            OSError,
            json.JSONDecodeError,
        ) as error:
            raise _unreadable(path, error) from error
    if h5py.is_hdf5(path) or zipfile.is_zipfile(path):
        return _load(path)
    raise ValueError(
        "`convert` reads .h5 and .keras files. Received: "
        f"{path}, which is neither, or damaged."
    )


def _load(path):
    """Loads what Keras 3 wrote; an .h5 file is not compiled."""
    is_hdf5 = h5py.is_hdf5(path)
    if is_hdf5:
        with h5py.File(path) as file:
            if "model_config" not in file.attrs:
                raise ValueError(
                    "`convert` needs a whole model. Received: "
                    f"{path}, which has no model's config."
                )
    else:
        # Refuses one that would fill the memory.
        json_member(path, "config.json")
    try:
        return keras.saving.load_model(path, compile=not is_hdf5)
    except Exception as error:
        # Keras raises many kinds, whatever is wrong with a file.
        raise _unreadable(path, error) from error


def _read_h5(path):
    with h5py.File(path) as file:
        config = file.attrs["model_config"]
        if len(config) > LARGEST_TEXT:
            raise _unreadable(path, f"its config has {len(config):,} bytes")
        model = _model_of(json.loads(config), path)
        groups = file["model_weights"]
        for layer in model.layers:
            _load_by_names(layer, _weights_in(groups, layer.name), path)
    return model


def _read_archive(path):
    config = json_member(path, "config.json")
    model = _model_of(config, path)
    with (
        zipfile.ZipFile(path) as archive,
        archive.open("model.weights.h5") as file,
        h5py.File(file) as h5,
    ):
        _load_by_classes(model, config, h5, path)
    return model


def _model_of(config, path):
    try:
        model = keras.saving.deserialize_keras_object(_for_keras_3(config))
    except Exception as error:
        # Keras raises many kinds, whatever is wrong with a config.
        raise _unreadable(path, error) from error
    if not isinstance(model, keras.Model):
        raise _unreadable(path, "there is no model in it")
    for layer in model._flatten_layers():
        if isinstance(layer, BatchNormalization):
            layer.unbiased_variance = _is_fused(layer)
    return model


def _is_fused(layer):
    """Whether tf-keras takes its fused operation if not told otherwise."""
    rank = layer.input_spec.ndim
    return (
        rank in (4, 5)
        and isinstance(layer.axis, int)
        and layer.axis % rank in (1, rank - 1)
        and not (layer.renorm or layer.synchronized)
        and layer.virtual_batch_size is None
    )


def _for_keras_3(config):
    if isinstance(config, list):
        return [_for_keras_3(one) for one in config]
    if not isinstance(config, dict):
        return config
    config = {name: _for_keras_3(one) for name, one in config.items()}
    # Of another optimizer's class, and with None where Keras 3 counts.
    config.pop("compile_config", None)
    name = config.get("class_name")
    if name in _CLASSES:
        layer = dict(config["config"])
        for unknown in _NOT_HERE:
            layer.pop(unknown, None)
        axes = layer["axis"]
        if isinstance(axes, list):
            # A layer of tf-keras that was built counts the ghost batches'
            # axis as well.
            extra = layer.get("virtual_batch_size") is not None
            axes = [axis - extra for axis in axes]
            layer["axis"] = axes if len(axes) > 1 else axes[0]
        if name == "SyncBatchNormalization":
            layer["synchronized"] = True
        config["config"] = layer
        config["class_name"] = "BatchNormalization"
        config["module"] = "keras_bn.layer"
        config["registered_name"] = "keras_bn>BatchNormalization"
        config.pop("build_config", None)
    elif name == "Functional":
        config["module"] = "keras.src.models.functional"
        config["registered_name"] = "Functional"
        _count_calls_from_0(config["config"])
    elif name == "Sequential":
        config["module"], config["registered_name"] = "keras", None
    elif name in ("DepthwiseConv1D", "DepthwiseConv2D"):
        # Theirs has the arguments of Conv2D.
        for unknown in ("filters", "groups"):
            config["config"].pop(unknown, None)
    elif isinstance(config.get("config"), dict) and name in _RECURRENT:
        # True is refused by Keras 3, which has no other layout.
        if not config["config"].get("time_major"):
            config["config"].pop("time_major", None)
    elif name == "Policy":
        return config["config"]["name"]
    return config


def _count_calls_from_0(config):
    """In tf-keras the first call of a model that begins with Input is 1.

    Keras 3 sees to that itself for functional models in `output_layers`.
    """
    models = {
        part["config"]["name"]: part["class_name"]
        for part in config["layers"]
        if part["class_name"] in ("Functional", "Sequential")
        and part["config"]["layers"][0]["class_name"] == "InputLayer"
    }

    def counted(value, names):
        if not isinstance(value, list):
            return value
        if len(value) > 2 and isinstance(value[0], str):
            name, call, *rest = value
            return [name, call - (name in names), *rest]
        return [counted(one, names) for one in value]

    for part in config["layers"]:
        part["inbound_nodes"] = counted(part["inbound_nodes"], models)
    config["output_layers"] = counted(
        config["output_layers"],
        [name for name, kind in models.items() if kind == "Sequential"],
    )


def _weights_in(groups, name):
    """List of the names and datasets of one layer's group, in their order."""
    if name not in groups:
        return []
    group = groups[name]
    return [
        (text, group[text])
        for text in map(_text, group.attrs.get("weight_names", ()))
    ]


def _text(name):
    return name.decode() if isinstance(name, bytes) else name


def _load_by_names(layer, weights, path):
    """Loads a layer's weights, or those of the layers in a model."""
    if is_graph(layer):
        for part in layer.layers:
            names = [
                (name, value)
                for name, value in weights
                if part.name in name.split("/")[:-1] or is_graph(part)
            ]
            _load_by_names(part, names, path)
        return
    variables = [*layer.trainable_weights, *layer.non_trainable_weights]
    own = {name.split("/")[-1].split(":")[0]: x for name, x in weights}
    if len(own) == len(weights) and set(own) == {v.name for v in variables}:
        values = [own[v.name] for v in variables]
    else:
        values = [x for _, x in weights]
    _assign(layer, variables, values, path)


def _load_by_classes(model, config, group, path):
    """Loads weights under names of classes, counted in the config's order."""
    counts = collections.Counter()
    groups = group["layers"]
    for part in config["config"]["layers"]:
        name = to_snake_case(part["class_name"])
        key = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1
        if part["class_name"] == "InputLayer" or key not in groups:
            continue
        layer = model.get_layer(part["config"]["name"])
        if is_graph(layer):
            _load_by_classes(layer, part, groups[key], path)
        else:
            _load_parts(layer, groups[key], path)


def _load_parts(layer, group, path):
    for name, part in group.items():
        if name == "vars":
            values = [part[str(i)] for i in range(len(part))]
            variables = [
                *layer._trainable_variables,
                *layer._non_trainable_variables,
            ]
            _assign(layer, variables, values, path)
        elif isinstance(getattr(layer, name, None), keras.layers.Layer):
            _load_parts(getattr(layer, name), part, path)


def _assign(layer, variables, values, path):
    """Gives variables the arrays of datasets, read once their sizes fit."""
    sizes = [int(np.prod(v.shape)) for v in variables]
    if sizes != [x.size for x in values]:
        raise ValueError(
            "`convert` needs the same weights in the file as in the layer. "
            f"Received: {path} with {[x.shape for x in values]} for layer "
            f"{layer.name!r} with {[tuple(v.shape) for v in variables]}."
        )
    for variable, value in zip(variables, values):
        variable.assign(np.asarray(value).reshape(variable.shape))


def _unreadable(what, error):
    text = str(error).split("Exception encountered:")[-1]
    return ValueError(
        f"`convert` cannot make a model of Keras 3. Received: {what}: "
        f"{' '.join(text.split())[:300]}"
    )

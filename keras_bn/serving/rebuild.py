"""Writes the SavedModel of a model that lives on JAX or PyTorch.

Keras has one backend in a process. So the model goes through a `.keras` file
into a process of its own, on TensorFlow, which writes it from there: the same
graph whatever the model was trained on. Run by its path it is that process.
"""

import hashlib
import importlib
import json
import os
import re
import sys
import tempfile

import keras
import numpy as np

from keras_bn.serving import child_process
from keras_bn.serving.errors import ExportError
from keras_bn.serving.errors import one_line
from keras_bn.serving.interface import interface_of

_MODEL = "model.keras"
_PREPROCESSING = "preprocessing.keras"
_WARMUP = "warmup.npz"


def write(folder, model, preprocessing, interface, warmup, name):
    """As `keras_bn.serving.saved_model.write`, from any backend.

    Raises:
        ExportError: The model cannot be saved or loaded, a custom layer is not
            known there, or it cannot be written.
    """
    # A folder that nobody else can write to.
    with tempfile.TemporaryDirectory() as files:
        models = [model]
        _save(model, os.path.join(files, _MODEL))
        if preprocessing is not None:
            models.append(preprocessing)
            _save(preprocessing, os.path.join(files, _PREPROCESSING))
        if warmup is not None:
            np.savez(os.path.join(files, _WARMUP), *warmup)
        modules = _modules_of(models)
        child_process.run(
            "Rebuilding the model on TensorFlow",
            __file__,
            {
                "files": files,
                "digests": {x: _digest(files, x) for x in os.listdir(files)},
                "folder": str(folder),
                "class_names": interface.class_names,
                "name": name,
                "modules": modules,
            },
            {"KERAS_BACKEND": "tensorflow"},
            ["keras", "keras_bn", "keras_bn_checks", "numpy", *modules],
        )


def _save(model, path):
    try:
        model.save(path)
    except Exception as error:
        # Keras raises many kinds for what it cannot save.
        raise ExportError(
            f"{model!r} cannot be saved as a .keras file, by which it gets "
            f"to TensorFlow: {one_line(error)}. Nothing was published."
        ) from error


def _digest(folder, name):
    with open(os.path.join(folder, name), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _modules_of(models):
    """Where the classes of the layers are defined, to be imported there.

    Importing them registers the custom ones, as it did here.
    """
    layers = [layer for model in models for layer in model._flatten_layers()]
    modules = {type(layer).__module__ for layer in layers}
    return sorted(
        name
        for name in modules - {"__main__"}
        if name.partition(".")[0] != "keras"
    )


def main():
    """The process on TensorFlow."""
    from keras_bn.serving import saved_model

    request = json.load(sys.stdin)
    files = request["files"]
    for name, digest in request["digests"].items():
        if _digest(files, name) != digest:
            # They may hold code, and are loaded as files of one's own.
            raise ValueError(f"{name} was changed by another process")
    for module in request["modules"]:
        try:
            importlib.import_module(module)
        except Exception:
            # Loading says which class is missing.
            pass
    model = _load(os.path.join(files, _MODEL))
    preprocessing = None
    if _PREPROCESSING in request["digests"]:
        preprocessing = _load(os.path.join(files, _PREPROCESSING))
    warmup = None
    if _WARMUP in request["digests"]:
        with np.load(os.path.join(files, _WARMUP)) as arrays:
            warmup = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    saved_model.write(
        request["folder"],
        model,
        preprocessing,
        interface_of(model, preprocessing, request["class_names"]),
        warmup,
        request["name"],
    )


def _load(path):
    try:
        # What started this process made the file a moment ago from what it
        # runs itself, so it may hold functions.
        return keras.saving.load_model(path, compile=False, safe_mode=False)
    except Exception as error:
        # Keras raises many kinds, each with a model's whole configuration.
        unknown = re.search("Could not locate \\w+ '[^']+'", str(error))
        if unknown is None:
            raise
        raise ValueError(
            f"{unknown[0]}. Define it in a module that can be imported, under "
            "@keras.saving.register_keras_serializable()"
        ) from error


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        child_process.fail(error)

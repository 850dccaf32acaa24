"""`export_saved_model`: from a trained model to a version that servers load."""

import os
import typing
import warnings
from pathlib import Path

import keras

from keras_bn.backends import is_installed
from keras_bn.model_layers import BATCH_NORMALIZATIONS
from keras_bn.serving import rebuild
from keras_bn.serving.errors import ExportError
from keras_bn.serving.errors import one_line
from keras_bn.serving.interface import as_arrays
from keras_bn.serving.interface import check_model
from keras_bn.serving.interface import interface_of
from keras_bn.serving.interface import random_batch
from keras_bn.serving.preprocessing import preprocessing_model
from keras_bn.serving.publishing import publish
from keras_bn.serving.verification import verify
from keras_bn_checks import check_destination


class Export(typing.NamedTuple):
    """A version that was published.

    Attributes:
        path: `pathlib.Path` of the version.
        fold_report: The `FoldReport` of its layers; None where none was
            folded.
        inputs: Dictionary of arrays by the names of the inputs, the batch that
            it was checked on.
        differences: What `verify` returned.
    """

    path: Path
    fold_report: typing.Any
    inputs: dict
    differences: dict


def export_saved_model(
    model,
    directory,
    version=None,
    fold=True,
    preprocessing=None,
    class_names=None,
    warmup=None,
    verify_on=None,
):
    """Publishes a model as a version that TensorFlow Serving loads.

    Writes a TensorFlow SavedModel to `directory/<version>`, which appears at
    once and whole. Before it does, a process with TensorFlow alone loads it
    and runs every signature; where an output is not that of `model`, nothing
    is published. It loads without `keras` and `keras_bn`. From JAX and
    PyTorch the model is rebuilt on TensorFlow, from a `.keras` file in a
    process of its own. The model itself is not changed.

    The signatures take batches of any size and apply `preprocessing` first,
    so that clients send what was in the files of the training data:

    - `serving_default`: `inputs`, of the model's input dtype, to `outputs`.
      Several inputs have the names of the model's, several outputs the keys of
      its dictionary or `outputs_0`, `outputs_1`, ... float16 and bfloat16
      come out as float32.
    - `serving_uint8`: the same from uint8, for a model of images, inputs
      (batch, height, width, 1, 3 or 4 channels).
    - `classify_bytes`, with `class_names`: `image_bytes`, a vector of PNG and
      JPEG files as bytes, to `class_names` (text) and `probabilities`
      (float32), both (batch, classes), the most probable first. Images must
      have the model's height and width. What is not such an image is an
      InvalidArgument error that tells its place in the batch.

    Args:
        model: Functional or sequential `keras.Model`, built.
        directory: Path of the model, above its versions: new, empty, or with
            numbered versions.
        version: Int of at least 1 that is not there yet. None: one more than
            the highest there.
        fold: Whether batch normalization is folded into its neighbours by
            `keras_bn.fold`.
        preprocessing: What a batch went through before the model in training.
            A pair (mean, deviation) of numbers, or of one for each channel:
            `(inputs - mean) * (1 / deviation)` in float32. Or a Keras layer or
            model, of float32 inputs of the model's shape unless it has
            inputs of its own. None: nothing.
        class_names: List of the classes' names in the order of the model's
            logits or softmax; also kept as `assets/labels.txt`.
        warmup: Batch of samples as clients send them, for requests that
            TensorFlow Serving runs before it says that the version is ready:
            for each signature one of the first sample and one of all. None:
            of the batch that the export is verified on. False: none. It needs
            the extra `serving`, without which None writes none and warns.
        verify_on: Batch of samples as clients send them; a few dozen of the
            training data are best. None: 8 random ones, pixels 0 to 255.
            Several inputs are given as a list or a dictionary by name.

    Returns:
        `pathlib.Path` of the version.

    Raises:
        ValueError: An argument is none of the above; or from `keras_bn.fold`,
            that a model cannot be folded.
        ImportError: TensorFlow, or for `warmup` tensorflow-serving-api, is not
            installed.
        keras_bn.serving.errors.ExportError: The export does not answer as the
            model does, or cannot be written, loaded or run; the model cannot
            be rebuilt on TensorFlow.
        OSError: The directory cannot be written.
    """
    return export(
        model,
        directory,
        version,
        fold,
        preprocessing,
        class_names,
        warmup,
        verify_on,
    ).path


def export(
    model,
    directory,
    version=None,
    fold=True,
    preprocessing=None,
    class_names=None,
    warmup=None,
    verify_on=None,
):
    """As `export_saved_model`; returns an `Export`."""
    check_model(model)
    check_destination(directory, version)
    directory = Path(os.path.abspath(directory))
    before = preprocessing_model(preprocessing, model)
    interface = interface_of(model, before, class_names)
    if verify_on is None:
        batch = random_batch(interface)
    else:
        batch = as_arrays("verify_on", verify_on, interface)
    if warmup is not None and warmup is not False:
        warmup = as_arrays("warmup", warmup, interface)
    _check_tensorflow()
    requests = _requests(warmup, batch)
    folded = _folded(model) if fold else model
    differences = {}

    def fill(folder):
        write = _writer()
        try:
            write(folder, folded, before, interface, requests, directory.name)
        except ExportError:
            raise
        except Exception as error:
            # TensorFlow has kinds of its own, for a full disk too.
            raise ExportError(
                f"The SavedModel cannot be written: {type(error).__name__}: "
                f"{one_line(error)}. Nothing was published."
            ) from error
        differences.update(verify(folder, model, before, interface, batch))

    path = publish(directory, version, fill)
    names = [one.name for one in interface.inputs]
    return Export(
        path,
        None if folded is model else folded.fold_report,
        dict(zip(names, batch, strict=True)),
        differences,
    )


def _folded(model):
    layers = model._flatten_layers()
    if not any(isinstance(layer, BATCH_NORMALIZATIONS) for layer in layers):
        return model
    from keras_bn.surgery.fold import fold

    return fold(model)


def _writer():
    if keras.backend.backend() != "tensorflow":
        return rebuild.write
    from keras_bn.serving import saved_model

    return saved_model.write


def _check_tensorflow():
    if not is_installed("tensorflow"):
        raise ImportError(
            "`export_saved_model` needs TensorFlow, on every backend; it "
            "writes the SavedModel and checks it. Install it beside "
            f"{keras.backend.backend()}: pip install tensorflow"
        )


def _requests(warmup, batch):
    """The samples of warm-up requests, or None."""
    if warmup is False:
        return None
    if is_installed("tensorflow_serving"):
        return batch if warmup is None else warmup
    if warmup is not None:
        raise ImportError(
            "`warmup` needs TensorFlow Serving's protos: "
            "pip install tensorflow-serving-api"
        )
    warnings.warn(
        "No warm-up requests are written, for want of TensorFlow Serving's "
        "protos: pip install tensorflow-serving-api, or give warmup=False.",
        stacklevel=4,
    )
    return None

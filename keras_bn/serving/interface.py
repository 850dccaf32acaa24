"""What a model takes and gives when it is served."""

import typing

import keras
import numpy as np

from keras_bn_checks import is_control

IMAGE_CHANNELS = (1, 3, 4)


class Input(typing.NamedTuple):
    """One input as it is sent, before preprocessing.

    Attributes:
        name: What it is called in a request.
        shape: Tuple of int or None, without the batch axis.
        dtype: Name of its dtype.
    """

    name: str
    shape: tuple
    dtype: str


class Interface(typing.NamedTuple):
    """What a served model takes and gives.

    Attributes:
        inputs: Tuple of `Input`.
        outputs: Tuple of names. Its float16 and bfloat16 outputs are sent as
            float32, which all clients know.
        takes_images: Whether uint8 images can be sent as well.
        class_names: Tuple of str in the order of the only output, where
            encoded images are classified; else None.
        activation: "softmax" where that output holds probabilities, "linear"
            where it holds logits; None without `class_names`.
    """

    inputs: tuple
    outputs: tuple
    takes_images: bool
    class_names: tuple | None
    activation: str | None


def interface_of(model, preprocessing=None, class_names=None):
    """The `Interface` of a model.

    Args:
        model: Functional or sequential `keras.Model`, built.
        preprocessing: What `preprocessing_model` returned.
        class_names: As for `export_saved_model`.

    Raises:
        ValueError: The model does not classify images of one size, or the
            names do not fit it or have control characters.
    """
    first = model if preprocessing is None else preprocessing
    inputs = tuple(
        Input(
            name, tuple(x.shape[1:]), keras.backend.standardize_dtype(x.dtype)
        )
        for name, x in zip(_input_names(first), first.inputs)
    )
    takes_images = (
        len(inputs) == 1
        and len(inputs[0].shape) == 3
        and inputs[0].shape[-1] in IMAGE_CHANNELS
    )
    outputs = _output_names(model)
    for name in (*(one.name for one in inputs), *outputs):
        if any(map(is_control, name)):
            raise ValueError(
                "Clients send and receive the names of a model's inputs and "
                "outputs, which must have no control characters. "
                f"Received: {name!r}."
            )
    activation = None
    if class_names is not None:
        class_names = _checked_names(class_names)
        if not takes_images or None in inputs[0].shape:
            raise ValueError(
                "`class_names` adds the signature `classify_bytes`, which "
                "needs a model of images: one input of shape (height, width, "
                f"channels), channels one of {IMAGE_CHANNELS}. Received: a "
                f"model of inputs {[x.shape for x in inputs]}."
            )
        activation = _checked_activation(model, class_names)
    return Interface(inputs, outputs, takes_images, class_names, activation)


def check_model(model):
    """Refuses what cannot be exported.

    Raises:
        ValueError: `model` is no functional or sequential `keras.Model`, or
            not built.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`export_saved_model` takes a keras.Model of Keras 3. Received: "
            f"model of type {type(model).__module__}.{type(model).__name__}."
        )
    if not model.built:
        raise ValueError(
            "`export_saved_model` needs a model that is built. Received: "
            f"model={model!r}. Call the model on a batch first."
        )
    if not getattr(model, "inputs", None):
        raise ValueError(
            "`export_saved_model` takes a functional or sequential model. "
            f"Received: model={model!r}, whose inputs are in its `call` alone. "
            "Make inputs = keras.Input(...) and export "
            "keras.Model(inputs, model(inputs))."
        )


def call(model, preprocessing, inputs):
    """Calls a model in inference.

    Args:
        model: Functional or sequential model.
        preprocessing: Model of one input, or None.
        inputs: List of tensors, before preprocessing.

    Returns:
        List of tensors.
    """
    if preprocessing is not None:
        inputs = [preprocessing(*inputs, training=False)]
    if len(inputs) == 1:
        (packed,) = inputs
    else:
        packed = keras.tree.pack_sequence_as(model.input, list(inputs))
    return keras.tree.flatten(model(packed, training=False))


def as_arrays(what, batch, interface):
    """A batch as the served model takes it.

    Args:
        what: Name of the argument that it was.
        batch: Array of one input; a list, or a dictionary by name, of several.
        interface: `Interface`.

    Returns:
        List of arrays (samples, *shape) of the inputs' dtypes.

    Raises:
        ValueError: It is something else, or holds no sample.
    """
    inputs = interface.inputs
    names = [one.name for one in inputs]
    if isinstance(batch, dict):
        if set(batch) != set(names):
            raise ValueError(
                f"`{what}` must have the model's inputs {names}. "
                f"Received: {what} with {sorted(batch)}."
            )
        arrays = [batch[name] for name in names]
    elif len(inputs) == 1:
        arrays = [batch]
    else:
        if not isinstance(batch, (list, tuple)) or len(batch) != len(inputs):
            raise ValueError(
                f"`{what}` must be a list or dictionary of an array for each "
                f"of the model's inputs {names}. Received: {what} of type "
                f"{type(batch).__name__}."
            )
        arrays = batch
    arrays = [_as_array(what, a, one) for a, one in zip(arrays, inputs)]
    if len({len(a) for a in arrays}) != 1 or not len(arrays[0]):
        raise ValueError(
            f"`{what}` must have at least one sample, and as many of each "
            f"input. Received: {what} with {[len(a) for a in arrays]} samples."
        )
    return arrays


def random_batch(interface, samples=8):
    """A batch of numbers that the model may take; pixels are 0 to 255.

    Axes of any length get 32 positions, integers are 0 or 1.
    """
    random = np.random.default_rng(0)
    arrays = []
    for one in interface.inputs:
        shape = (samples, *(32 if n is None else n for n in one.shape))
        if interface.takes_images:
            values = random.integers(0, 256, shape)
        elif "float" in one.dtype:
            values = random.normal(size=shape)
        else:
            values = random.integers(0, 2, shape)
        arrays.append(_cast(values, one.dtype))
    return arrays


def as_uint8_images(arrays):
    """The only input of `arrays`, rounded to images of uint8."""
    (images,) = arrays
    return np.clip(np.rint(np.float64(images)), 0, 255).astype("uint8")


def _as_array(what, values, one):
    array = np.asarray(values)
    fits = array.ndim == len(one.shape) + 1 and all(
        n is None or n == m for n, m in zip(one.shape, array.shape[1:])
    )
    if not fits or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{what}` must hold numbers of shape (samples, "
            f"{', '.join('any' if n is None else str(n) for n in one.shape)}) "
            f"for {one.name!r}. Received: shape {array.shape}, dtype "
            f"{array.dtype}."
        )
    return _cast(array, one.dtype)


def _cast(array, dtype):
    # NumPy has no bfloat16; the graph casts.
    return array.astype("float32" if dtype == "bfloat16" else dtype)


def _input_names(model):
    if len(model.inputs) == 1:
        return ["inputs"]
    if isinstance(model.input, dict):
        flat = keras.tree.flatten({name: name for name in model.input})
        if len(flat) == len(model.inputs):
            return flat
    return [x.name for x in model.inputs]


def _output_names(model):
    if len(model.outputs) == 1:
        return ("outputs",)
    # A sequential model has no such attribute, nor a dictionary.
    outputs = getattr(model, "output", model.outputs)
    flat = keras.tree.flatten(outputs)
    if isinstance(outputs, dict) and len(outputs) == len(flat):
        return tuple(keras.tree.flatten({name: name for name in outputs}))
    return tuple(f"outputs_{number}" for number in range(len(flat)))


def _checked_names(class_names):
    names = (
        tuple(class_names)
        if isinstance(class_names, (list, tuple, np.ndarray))
        else ()
    )
    if not names or not all(
        isinstance(name, str) and name and not any(map(is_control, name))
        for name in names
    ):
        raise ValueError(
            "`class_names` must be a list of the classes' names, text of one "
            "line each without control characters. "
            f"Received: class_names={class_names!r}."
        )
    return tuple(map(str, names))


def _checked_activation(model, class_names):
    shapes = [x.shape for x in model.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise ValueError(
            "`class_names` is for a model with one output of shape (batch, "
            f"classes). Received: a model of outputs {shapes}."
        )
    if shapes[0][1] != len(class_names):
        raise ValueError(
            f"`class_names` must have a name for each of {shapes[0][1]} "
            f"outputs. Received: {len(class_names)} names."
        )
    activation = _activation_of(model.outputs[0])
    if activation not in ("linear", "softmax"):
        raise ValueError(
            "`class_names` is for a model that ends in logits or softmax. "
            "Received: a model that ends in "
            f"{activation or 'a layer of unknown outputs'}. Put "
            "keras.layers.Softmax() or Activation('linear') behind it."
        )
    return activation


def _activation_of(output):
    """Name of what a Keras tensor went through last; None: not to be seen."""
    operation, _, index = output._keras_history
    if isinstance(operation, keras.Model):
        if not getattr(operation, "outputs", None):
            return None
        return _activation_of(operation.outputs[index])
    if isinstance(operation, keras.layers.Softmax):
        return "softmax"
    if type(operation).__name__ == "Softmax":  # keras.ops.softmax
        return "softmax"
    activation = getattr(operation, "activation", None)
    if activation is not None:
        return getattr(activation, "__name__", None)
    # Dropout, batch normalization, a pool, a sum: they change no meaning.
    known = type(operation).__module__.partition(".")[0] in (
        "keras",
        "keras_bn",
    )
    opaque = (keras.layers.Lambda, keras.layers.Wrapper)
    layer = isinstance(operation, keras.layers.Layer)
    if known and layer and not isinstance(operation, opaque):
        return "linear"
    return None

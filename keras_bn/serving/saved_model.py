"""Writes a model as a SavedModel. This module alone needs TensorFlow.

The signatures hold plain TensorFlow operations and variables: whoever loads
them needs neither `keras` nor `keras_bn`.
"""

import os
import tempfile

import tensorflow as tf

from keras_bn.compiled_functions import unnoticed
from keras_bn.serving import warmup as warmup_requests
from keras_bn.serving.interface import call

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"


def write(folder, model, preprocessing, interface, warmup, name):
    """Writes `saved_model.pb`, variables, assets and warm-up requests.

    Args:
        folder: Path of an empty folder.
        model: Functional or sequential model, on the TensorFlow backend.
        preprocessing: Model of one input, or None.
        interface: Their `Interface`.
        warmup: List of arrays, one for each input, or None for no requests.
        name: What the model is called in warm-up requests.
    """
    module = tf.Module()
    # Keras's variables know how to save themselves as TensorFlow's.
    module.weights = list(model.variables)
    if preprocessing is not None:
        module.weights += preprocessing.variables
    functions = _functions(model, preprocessing, interface)
    with unnoticed(), tempfile.TemporaryDirectory() as temporary:
        signatures = {
            name: function.get_concrete_function()
            for name, function in functions.items()
        }
        if interface.class_names is not None:
            labels = os.path.join(temporary, "labels.txt")
            with open(labels, "w", encoding="utf-8") as file:
                file.writelines(f"{n}\n" for n in interface.class_names)
            module.labels = tf.saved_model.Asset(labels)
        tf.saved_model.save(module, str(folder), signatures)
    if warmup is not None:
        names = [one.name for one in interface.inputs]
        inputs = dict(zip(names, warmup, strict=True))
        warmup_requests.write(folder, signatures, inputs, name)


def _functions(model, preprocessing, interface):
    """Dictionary of `tf.function`, by the names of the signatures."""

    def predict(*inputs):
        inputs = _not_empty(inputs)
        outputs = call(model, preprocessing, inputs)
        return {
            name: _widened(output)
            for name, output in zip(interface.outputs, outputs, strict=True)
        }

    specs = [
        tf.TensorSpec((None, *one.shape), one.dtype, one.name)
        for one in interface.inputs
    ]
    functions = {
        "serving_default": tf.function(predict, specs, autograph=False)
    }
    if not interface.takes_images:
        return functions
    (spec,) = specs

    def predict_uint8(images):
        return predict(tf.cast(images, spec.dtype))

    def classify_bytes(image_bytes):
        images = _decoded(image_bytes, spec.shape[1:])
        (outputs,) = predict_uint8(images).values()
        if interface.activation == "linear":
            outputs = tf.nn.softmax(outputs)
        order = tf.argsort(outputs, direction="DESCENDING", stable=True)
        names = tf.constant(interface.class_names)
        return {
            "class_names": tf.gather(names, order),
            "probabilities": tf.gather(outputs, order, batch_dims=1),
        }

    if spec.dtype != tf.uint8:
        functions["serving_uint8"] = tf.function(
            predict_uint8,
            [tf.TensorSpec(spec.shape, tf.uint8, spec.name)],
            autograph=False,
        )
    if interface.class_names is not None:
        functions["classify_bytes"] = tf.function(
            classify_bytes,
            [tf.TensorSpec((None,), tf.string, "image_bytes")],
            autograph=False,
        )
    return functions


def _not_empty(tensors):
    """The same, with an error where there is no sample in the batch.

    TensorFlow's fused convolution (oneDNN) gives an empty batch the shape of
    its inputs, and whatever comes behind it says something about that.
    Converters for other runtimes leave the check out.
    """
    check = tf.debugging.Assert(
        tf.shape(tensors[0])[0] > 0,
        ["a batch must have at least one sample. Received: an empty batch"],
    )
    with tf.control_dependencies([check]):
        return [tf.identity(tensor) for tensor in tensors]


def _widened(output):
    output = tf.convert_to_tensor(output)
    short = output.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(output, tf.float32) if short else output


def _decoded(image_bytes, shape):
    """Images of uint8 from a vector of PNG and JPEG files.

    The decoder itself would take other formats too, and an animation's first
    picture.
    """
    height, width, channels = shape
    (image_bytes,) = _not_empty([image_bytes])
    known = tf.logical_or(
        tf.equal(tf.strings.substr(image_bytes, 0, len(_PNG)), _PNG),
        tf.equal(tf.strings.substr(image_bytes, 0, len(_JPEG)), _JPEG),
    )
    # Where the first one is that is neither.
    first = tf.reduce_sum(tf.math.cumprod(tf.cast(known, tf.int32)))
    length = tf.strings.length(image_bytes[first : first + 1])
    check = tf.debugging.Assert(
        tf.reduce_all(known),
        [
            tf.strings.format(
                "classify_bytes takes PNG or JPEG images. Received: "
                "image_bytes[{}], {} bytes that are neither",
                (first, tf.reduce_sum(length)),
            )
        ],
    )

    def decode(number_and_bytes):
        number, one = number_and_bytes
        image = tf.io.decode_image(
            one, channels=channels, expand_animations=False
        )
        found = tf.shape(image)
        check = tf.debugging.Assert(
            tf.reduce_all(found[:2] == (height, width)),
            [
                tf.strings.format(
                    f"classify_bytes takes images of height {height} and "
                    f"width {width}. Received: image_bytes[{{}}] of height "
                    "{} and width {}",
                    (number, found[0], found[1]),
                )
            ],
        )
        with tf.control_dependencies([check]):
            image = tf.identity(image)
        image.set_shape(shape)
        return image

    with tf.control_dependencies([check]):
        image_bytes = tf.identity(image_bytes)
    return tf.map_fn(
        decode,
        (tf.range(tf.size(image_bytes)), image_bytes),
        fn_output_signature=tf.TensorSpec(shape, tf.uint8),
    )

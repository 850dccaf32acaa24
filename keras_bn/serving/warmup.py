"""Requests that a model server runs before it says that a version is ready.

TensorFlow Serving reads them from `assets.extra/tf_serving_warmup_requests`: a
TFRecord of PredictionLog protos, at most 1,000 (its "SavedModel Warmup"). The
first request of a size is slow; so it is not a user's.
"""

import os

import numpy as np

PLACE = os.path.join("assets.extra", "tf_serving_warmup_requests")


def write(folder, signatures, inputs, name):
    """Writes a request of the first sample and one of all, of each signature.

    Args:
        folder: Path of the SavedModel.
        signatures: Dictionary of concrete functions.
        inputs: Dictionary of arrays (samples, ...) by the names of the inputs.
        name: Name of the model.
    """
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    path = os.path.join(folder, PLACE)
    os.makedirs(os.path.dirname(path))
    sizes = sorted({1, *(len(array) for array in inputs.values())})
    with tf.io.TFRecordWriter(path) as file:
        for signature, function in signatures.items():
            specs = tf.nest.flatten(function.structured_input_signature)
            for size in sizes:
                tensors = {
                    spec.name: _tensor(spec, inputs, size) for spec in specs
                }
                request = predict_request(name, signature, tensors)
                log = prediction_log_pb2.PredictLog(request=request)
                file.write(
                    prediction_log_pb2.PredictionLog(
                        predict_log=log
                    ).SerializeToString()
                )


def predict_request(name, signature, tensors):
    """A `PredictRequest` as a client sends it by gRPC.

    Args:
        name: Name of the model.
        signature: Name of the signature.
        tensors: Dictionary of what `tf.make_tensor_proto` takes, by the names
            of the signature's inputs.
    """
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    for key, tensor in tensors.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(tensor))
    return request


def _tensor(spec, inputs, size):
    import tensorflow as tf

    if spec.name in inputs and spec.dtype != tf.uint8:
        return tf.cast(inputs[spec.name][:size], spec.dtype).numpy()
    (images,) = inputs.values()
    images = np.clip(np.rint(np.float64(images[:size])), 0, 255)
    images = images.astype("uint8")
    if spec.dtype == tf.uint8:
        return images
    return [tf.io.encode_png(image).numpy() for image in images]

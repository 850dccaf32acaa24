"""What is found out about a trained network: accuracy, audit, recalibration.

Beside Keras, this module needs keras_bn; the process has one backend.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from experiments import data
from experiments.evaluation import EVALUATION_BATCH
from experiments.recalibrated import IMAGES

if TYPE_CHECKING:
    import keras


def examine(model: keras.Model, dataset: data.Dataset) -> dict:
    """Examines a network; at the end its statistics are recalibrated.

    Args:
        model: the network, with the optimizer that trained it if it was
            compiled.
        dataset: the images that it is used on.

    Returns:
        test_accuracy: 0 to 1, with the moving statistics it came with.
        statistics: `statistics_of` the model.
        audit: what `keras_bn.audit` says, `without_data` and `with_data` and
            labels.
        refusal: why `recalibrate`, given labels, did nothing, or None.
        recalibrated: what it changed, with `force=True` after a refusal: an
            object for each layer.
        test_accuracy_recalibrated: 0 to 1.
    """
    images = dataset.train_images[:IMAGES].astype("float32")
    labels = dataset.train_labels[:IMAGES]
    facts = {
        "test_accuracy": accuracy(model, dataset),
        "statistics": statistics_of(model),
        "audit": {
            "without_data": _audit(model),
            "with_data": _audit(model, images, labels),
        },
    }
    changed, refusal = _recalibrate(model, images, labels)
    return {
        **facts,
        "refusal": refusal,
        "recalibrated": changed,
        "test_accuracy_recalibrated": accuracy(model, dataset),
    }


def accuracy(model: keras.Model, dataset: data.Dataset) -> float:
    """Returns the share of test images that a network in inference gets right.

    The model need not be compiled, and is not.
    """
    right = 0
    for start in range(0, len(dataset.test_labels), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        images = dataset.test_images[rows].astype("float32")
        logits = np.asarray(model.predict_on_batch(images))
        right += np.sum(logits.argmax(-1) == dataset.test_labels[rows])
    return float(right / len(dataset.test_labels))


def statistics_of(model: keras.Model) -> list[dict]:
    """Returns, for each layer, its name and what its moving statistics span.

    `moving_mean` and `moving_variance` are each the lowest, the median and
    the highest of all channels.
    """
    import keras

    return [
        {
            "layer": layer.name,
            **{
                name: [float(f(values)) for f in (np.min, np.median, np.max)]
                for name in ("moving_mean", "moving_variance")
                for values in [keras.ops.convert_to_numpy(getattr(layer, name))]
            },
        }
        for layer in model.layers
        if hasattr(layer, "moving_mean")
    ]


def accuracy_recalibrated(model: keras.Model, dataset: data.Dataset) -> float:
    """Returns the accuracy with recalibrated statistics.

    The model has its own moving statistics again afterwards.
    """
    import keras

    import keras_bn

    before = [
        (variable, keras.ops.convert_to_numpy(variable))
        for variable in model.non_trainable_variables
    ]
    images = dataset.train_images[:IMAGES].astype("float32")
    try:
        keras_bn.recalibrate(model, images, verbose=0)
        return accuracy(model, dataset)
    finally:
        for variable, value in before:
            variable.assign(value)


def _audit(model, *images_and_labels):
    import keras_bn

    report = keras_bn.audit(model, *images_and_labels, verbose=0)
    return json.loads(report.to_json())


def _recalibrate(model, images, labels):
    import keras_bn

    refusal = None
    try:
        changed = keras_bn.recalibrate(model, images, labels=labels, verbose=0)
    except ValueError as error:
        # The images are whole, so it is the weights that it refuses.
        refusal = str(error)
        changed = keras_bn.recalibrate(model, images, force=True, verbose=0)
    return [
        {
            "layer": one.layer,
            "mean_distance": one.mean_distance,
            "variance_log_ratio": one.variance_log_ratio,
        }
        for one in changed
    ], refusal

"""Models with weights that are far from initial ones."""

import keras
import numpy as np

from keras_bn.model_layers import BATCH_NORMALIZATIONS


def randomize(model, gamma="both signs", seed=0):
    """Sets all weights, those of batch normalization well away from 0 and 1.

    Args:
        gamma: "both signs", "positive", or "some zero": both signs and one 0.
    """
    generator = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model):
            continue
        for weight in (
            *layer._trainable_variables,
            *layer._non_trainable_variables,
        ):
            values = generator.normal(0.0, 0.5, weight.shape)
            if isinstance(layer, BATCH_NORMALIZATIONS):
                if "var" in weight.name or "std" in weight.name:
                    values = generator.uniform(0.5, 1.5, weight.shape)
                if weight.name == "gamma":
                    values = generator.uniform(0.5, 1.5, weight.shape)
                    if gamma != "positive":
                        values *= generator.choice([-1.0, 1.0], weight.shape)
                        values.flat[-1] = -1.0
                    if gamma == "some zero":
                        values.flat[0] = 0.0
            weight.assign(values)
    return model


def application(name, seed=0):
    """An architecture of Keras's, at a training pass's statistics.

    Returns:
        `(model, images)`: logits of 10 classes, gammas of both signs, and the
        images that the statistics are of.
    """
    size = 75 if name in ("InceptionV3", "Xception") else 64
    model = getattr(keras.applications, name)(
        weights=None,
        input_shape=(size, size, 3),
        classes=10,
        classifier_activation=None,
    )
    generator = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, BATCH_NORMALIZATIONS):
            layer.momentum = 0.0
            shape = layer.beta.shape
            layer.beta.assign(generator.normal(0.0, 0.3, shape))
            if layer.scale:
                values = generator.uniform(0.5, 1.5, shape)
                layer.gamma.assign(
                    values * generator.choice([-1.0, 1.0], shape)
                )
    # EfficientNet scales its inputs itself.
    largest = 255.0 if name.startswith("Efficient") else 1.0
    # With the statistics of six, InceptionV3 in float32 is 2e-3 of the logits'
    # deviation away from itself in float64, with those of 24 still 6e-4.
    count = 48 if name == "InceptionV3" else 6
    images = generator.uniform(0.0, largest, (count, size, size, 3))
    images = images.astype("float32")
    model(images, training=True)
    return model, images

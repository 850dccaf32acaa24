"""Small models that the tests of serving export."""

import keras
import numpy as np

import keras_bn

MEAN = [120.0, 115.5, 101.25]
DEVIATION = [62.0, 61.5, 70.0]
CLASS_NAMES = ["cat", "dog", "flying saucer"]
IMAGES = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), "uint8")


@keras.saving.register_keras_serializable(package="tests")
class Scale(keras.layers.Layer):
    """A layer of a user's, in a module that can be imported."""

    def call(self, inputs):
        return 2.0 * inputs


def image_model(*layers, filters=4):
    """Logits of three classes from images of 8 x 8, inputs standardized."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras_bn.BatchNormalization(momentum=0.5),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
            *layers,
        ]
    )
    model(standardized(IMAGES), training=True)
    gamma = model.layers[1].gamma
    gamma.assign(np.linspace(-1.5, 1.5, filters))
    return model


def folding_model():
    """The same with layers that `fold` treats in all its ways.

    Into the layer before, into the one after with a border, and as one
    multiplication and addition.
    """
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            keras_bn.BatchNormalization(momentum=0.0),
            layers.Conv2D(5, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.0),
            layers.ReLU(),
            keras_bn.BatchNormalization(momentum=0.0),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    for layer in model.layers:
        if hasattr(layer, "gamma"):
            size = layer.gamma.shape[0]
            layer.gamma.assign(np.linspace(-1.5, 1.0, size))
            layer.beta.assign(np.linspace(0.5, -1.0, size))
    model(standardized(IMAGES), training=True)
    return model


def standardized(images):
    """As `experiments.data.inputs` gives them in training."""
    shift = np.float32(MEAN)
    return (np.float32(images) - shift) * np.float32(1 / np.float64(DEVIATION))


def outputs(model, images):
    """Outputs for images in [0, 255], with the scaling done by NumPy."""
    tensor = keras.ops.convert_to_tensor(standardized(images))
    return keras.ops.convert_to_numpy(model(tensor, training=False))


def softmax(logits):
    shares = np.exp(np.float64(logits))
    return shares / shares.sum(axis=-1, keepdims=True)

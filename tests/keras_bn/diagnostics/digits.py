"""A small CNN that was trained on scikit-learn's digits, and forms of it."""

import functools

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_bn

TRAINING = 1400


@functools.cache
def images():
    """`(images, labels)`: float32 `(1797, 8, 8, 1)`, 0 to 255, and int32."""
    digits = load_digits()
    values = (digits.images[..., np.newaxis] * (255 / 16)).astype("float32")
    return values, digits.target.astype("int32")


def unseen():
    """The images, and the labels, that nothing is trained on."""
    values, labels = images()
    return values[TRAINING:], labels[TRAINING:]


def cnn(layer=keras_bn.BatchNormalization, dropout=0.0, **kwargs):
    """Two layers of normalization, after the activations; not compiled."""
    keras.utils.set_random_seed(0)
    kwargs = {"momentum": 0.9} | kwargs
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(12, 3, activation="relu"),
            layer(name="first", **kwargs),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(48, activation="relu"),
            layer(name="second", **kwargs),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )


def train(model, steps, values=None, labels=None, rate=3e-3):
    """Trains by `fit`, with batches of 64; the model is compiled anew."""
    if values is None:
        values, labels = (x[:TRAINING] for x in images())
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    order = np.random.default_rng(0).integers(0, len(values), steps * 64)
    model.fit(
        values[order], labels[order], batch_size=64, shuffle=False, verbose=0
    )
    return model


@functools.cache
def weights(inference=False):
    """Weights of 100 steps, by training as it should be, or in inference."""
    model = cnn()
    if inference:
        keras_bn.freeze(model)
    return train(model, 100).get_weights()


def trained(layer=keras_bn.BatchNormalization, inference=False, **kwargs):
    """A model with those weights that never had an optimizer."""
    model = cnn(layer, **kwargs)
    model.set_weights(weights(inference))
    return model

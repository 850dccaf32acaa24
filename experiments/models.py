"""The article's convolutional network, built from a `Condition`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from experiments import ExperimentError
from experiments import article

if TYPE_CHECKING:
    import keras

LAYERS = ("keras_bn", "keras")
# Where batch normalization stands: after the activation, as in the article,
# before it, or on the images alone.
PLACEMENTS = ("after", "before", "input")


def build(
    condition: article.Condition,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    layer: str = "keras_bn",
    seed: int = 0,
    synchronized: bool = False,
    placement: str = "after",
) -> keras.Model:
    """Builds the network of one condition.

    Two 5x5 convolutions (32 and 64 filters) with 2x2 max pooling, a dense
    layer of 1024 units, and the logits. Kernels start Glorot uniform and
    biases at zero, as in TensorFlow 1's ``tf.layers``. The initial kernels
    depend on `seed` alone, so the conditions, and all choices of `layer` and
    `placement`, start from the same ones.

    Args:
        condition: which of the 12 networks.
        input_shape: (height, width, channels) of an image.
        classes: number of logits.
        layer: the batch normalization layer: "keras_bn" for
            `keras_bn.BatchNormalization`, "keras" for Keras's own.
        seed: int of at least 0, of the initial kernels and of dropout.
        synchronized: whether batch normalization takes the moments of the
            batch over all replicas.
        placement: one of `PLACEMENTS`, for conditions with batch
            normalization; "input" is one layer of it, whichever layers the
            condition normalizes.

    Returns:
        A model from float32 (batch, *input_shape) to float32 logits
        (batch, classes); not compiled.

    Raises:
        ExperimentError: `layer` is not one of `LAYERS`, or "keras" is to be
            synchronized on a backend other than TensorFlow.
    """
    import keras
    from keras import layers

    batch_normalization = _batch_normalization(layer, synchronized)
    # A stream for each layer that draws random numbers. 31 bits: on PyTorch
    # Keras keeps a seed as int32.
    state = np.random.SeedSequence(seed).generate_state(5)
    seeds = (int(word) >> 1 for word in state)

    def kernel():
        return keras.initializers.GlorotUniform(seed=next(seeds))

    def normalize(name):
        return batch_normalization(
            momentum=article.MOMENTUM,
            epsilon=article.BATCH_NORM_EPSILON,
            synchronized=synchronized,
            name=name,
        )

    def add(make, name, where):
        """A layer, its activation, and what normalizes it in `where`."""
        normalized = placement != "input" and condition.batch_norm in where
        before = normalized and placement == "before"
        model.add(
            make(
                activation=None if before else "relu",
                kernel_initializer=kernel(),
                name=name,
            )
        )
        if normalized:
            model.add(normalize(f"batch_norm_{name}"))
        if before:
            model.add(layers.ReLU(name=f"relu_{name}"))

    model = keras.Sequential(name=f"condition_{condition.number}")
    model.add(keras.Input(input_shape))
    if placement == "input" and condition.batch_norm != "none":
        model.add(normalize("batch_norm_input"))
    for number, filters in ((1, 32), (2, 64)):
        conv = functools.partial(layers.Conv2D, filters, 5, padding="same")
        add(conv, f"conv{number}", ("conv", "both"))
        model.add(layers.MaxPooling2D(2, name=f"pool{number}"))
    model.add(layers.Flatten(name="flatten"))
    dense = functools.partial(layers.Dense, 1024)
    add(dense, "dense", ("dense", "both"))
    logits = layers.Dense(classes, kernel_initializer=kernel(), name="logits")
    if condition.dropout:
        model.add(
            layers.Dropout(condition.dropout, seed=next(seeds), name="dropout")
        )
    model.add(logits)
    return model


def _batch_normalization(layer, synchronized):
    if layer == "keras":
        import keras

        if synchronized and keras.backend.backend() != "tensorflow":
            raise ExperimentError(
                "Keras's own layer is synchronized on TensorFlow alone: give "
                "--layer=keras_bn, or leave out --synchronized"
            )
        from keras.layers import BatchNormalization

        return BatchNormalization
    if layer == "keras_bn":
        # Where keras_bn is not asked for, it need not be importable.
        from keras_bn import BatchNormalization

        return BatchNormalization
    raise ExperimentError(
        f"layer is one of {', '.join(LAYERS)}. Received: layer={layer!r}"
    )

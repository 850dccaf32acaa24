"""Gradient checkpointing: the backward pass calls the layer a second time."""

import keras
import numpy as np
import pytest

import keras_bn

BACKEND = keras.backend.backend()
MOMENTUM = 0.8


def _inputs():
    values = np.random.default_rng(0).standard_normal((32, 3)) + 3
    return values.astype("float32")


def _once(inputs):
    """The moving mean and variance after one update from 0 and 1."""
    inputs = inputs.astype("float64")
    return (
        inputs.mean(0) * (1 - MOMENTUM),
        MOMENTUM + inputs.var(0) * (1 - MOMENTUM),
    )


def _gradient_of_keras(inputs, train):
    layer = keras.layers.BatchNormalization(momentum=MOMENTUM)
    layer.build(inputs.shape)
    return train(layer, inputs, None)[0]


def _train_on_jax(layer, inputs, how):
    import jax

    trainable = [v.value for v in layer.trainable_variables]

    def loss(inputs, state):
        outputs, state = layer.stateless_call(
            trainable, state, inputs, training=True
        )
        return (outputs**3).sum(), state

    if how is not None:
        loss = jax.checkpoint(loss)
    gradient = jax.grad(loss, has_aux=True)
    if how == "jitted":
        gradient = jax.jit(gradient)
    state = [v.value for v in layer.non_trainable_variables]
    gradient, moving = gradient(inputs, state)
    return [np.asarray(x) for x in (gradient, *moving)]


def _train_on_torch(layer, inputs, how):
    import torch
    from torch.utils.checkpoint import checkpoint

    inputs = torch.tensor(inputs, requires_grad=True)
    # What follows the layer, for PyTorch stops a recomputation early.
    call = lambda x: layer(x, training=True) ** 3  # noqa: E731
    if how is None:
        outputs = call(inputs)
    elif how == "scope":
        outputs = layer(inputs, training=True) ** 3
    else:
        outputs = checkpoint(call, inputs, use_reentrant=how == "reentrant")
    outputs.sum().backward()
    return [
        x.detach().numpy()
        for x in (
            inputs.grad,
            layer.moving_mean.value,
            layer.moving_variance.value,
        )
    ]


def _train_on_tensorflow(layer, inputs, how):
    import tensorflow as tf

    call = lambda x: layer(x, training=True)  # noqa: E731
    if how in ("recomputed", "graph"):
        call = tf.recompute_grad(call)

    def gradient_of(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(call(inputs) ** 3)
        return tape.gradient(loss, inputs)

    if how == "graph":
        gradient_of = tf.function(gradient_of)
    gradient = gradient_of(tf.constant(inputs))
    moving = layer.moving_mean, layer.moving_variance
    return [x.numpy() for x in (gradient, *moving)]


TRAIN, WAYS = {
    "jax": (_train_on_jax, ["eager", "jitted"]),
    "torch": (_train_on_torch, ["reentrant", "not reentrant", "scope"]),
    "tensorflow": (_train_on_tensorflow, ["recomputed", "graph", "scope"]),
}[BACKEND]


@pytest.mark.parametrize("how", WAYS)
def test_moving_statistics_are_updated_once(how):
    """On TensorFlow by the momentum that the README names."""
    inputs = _inputs()
    twice = BACKEND == "tensorflow"
    scope = keras.RematScope(mode="full" if how == "scope" else None)
    with scope:
        layer = keras_bn.BatchNormalization(
            momentum=MOMENTUM**0.5 if twice else MOMENTUM
        )
        layer.build(inputs.shape)
        gradient, *moving = TRAIN(layer, inputs, how)
    for found, expected in zip(moving, _once(inputs)):
        np.testing.assert_allclose(found, expected, 1e-5)
    expected = _gradient_of_keras(inputs, TRAIN)
    np.testing.assert_allclose(gradient, expected, 1e-3, 1e-4)


def test_a_second_step_updates_again():
    inputs = _inputs()
    layer = keras_bn.BatchNormalization(momentum=MOMENTUM)
    layer.build(inputs.shape)
    for _ in range(2):
        _, mean, _ = TRAIN(layer, inputs, None)
        if BACKEND == "jax":
            layer.moving_mean.assign(mean)
    expected = inputs.mean(0, dtype="float64") * (1 - MOMENTUM**2)
    np.testing.assert_allclose(mean, expected, 1e-5)

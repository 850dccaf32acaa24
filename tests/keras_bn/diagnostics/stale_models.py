"""Models and loops whose statistics move or stand still."""

import keras
import numpy as np
from keras import ops

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, [1.0, 2.0, 0.5], (32, 3)).astype("float32")
Y = RNG.normal(size=(32, 1)).astype("float32")

if frameworks.IS_TENSORFLOW:
    import tensorflow as tf
elif frameworks.IS_JAX:
    import jax


def model_of(*layers, name=None):
    return keras.Sequential(
        [keras.Input((3,)), *layers, keras.layers.Dense(1)], name=name
    )


class InInference(keras.Model):
    """Forgets `training`, as a `train_step` of one's own may."""

    def __init__(self, layer):
        super().__init__()
        self.normalize = layer
        self.dense = keras.layers.Dense(1)
        self(X)

    def call(self, x):
        return self.dense(self.normalize(x, training=False))


def compiled(model, learning_rate=0.01, **kwargs):
    model.compile(keras.optimizers.SGD(learning_rate), "mse", **kwargs)
    return model


def loop(model, steps, training=True, keeps=True, assigns=True, after=None):
    """A training loop as one writes it for the backend.

    Args:
        training: What the model is called with.
        keeps: Whether JAX's non-trainable variables are kept.
        assigns: Whether JAX's variables are given to the model at the end.
        after: Function of the lists of variables, called after each step.
    """
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)
    if frameworks.IS_JAX:
        _jax_loop(model, optimizer, steps, training, keeps, assigns, after)
        return
    for _ in range(steps):
        variables = model.trainable_variables
        if frameworks.IS_TENSORFLOW:
            with tf.GradientTape() as tape:
                loss = ops.mean((model(X, training=training) - Y) ** 2)
            gradients = tape.gradient(loss, variables)
        else:
            model.zero_grad()
            y = ops.convert_to_tensor(Y)
            loss = ops.mean((model(X, training=training) - y) ** 2)
            loss.backward()
            gradients = [v.value.grad for v in variables]
        optimizer.apply(gradients, variables)
        if after is not None:
            after()


def _jax_loop(model, optimizer, steps, training, keeps, assigns, after):
    def loss_of(trainable, non_trainable):
        outputs, non_trainable = model.stateless_call(
            trainable, non_trainable, X, training=training
        )
        return ops.mean((outputs - Y) ** 2), non_trainable

    @jax.jit
    def step(trainable, non_trainable, state):
        gradients, non_trainable = jax.grad(loss_of, has_aux=True)(
            trainable, non_trainable
        )
        trainable, state = optimizer.stateless_apply(
            state, gradients, trainable
        )
        return trainable, non_trainable, state

    trainable = [v.value for v in model.trainable_variables]
    non_trainable = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in optimizer.variables]
    for _ in range(steps):
        trainable, new, state = step(trainable, non_trainable, state)
        if keeps:
            non_trainable = new
        if after is not None:
            after(trainable, non_trainable)
    if assigns:
        for v, value in zip(model.trainable_variables, trainable):
            v.assign(value)
        for v, value in zip(model.non_trainable_variables, non_trainable):
            v.assign(value)

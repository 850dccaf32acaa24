"""One spelling for what each framework spells differently.

Tests are written with NumPy arrays and these functions; the arrays that come
back are float64, or float32 where the tensor was narrower.
"""

import contextlib
import dataclasses

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
IS_TENSORFLOW = BACKEND == "tensorflow"
IS_JAX = BACKEND == "jax"
IS_TORCH = BACKEND == "torch"

if IS_TENSORFLOW:
    import tensorflow as tf
elif IS_JAX:
    import jax
elif IS_TORCH:
    import torch


def precision(dtype):
    """A context in which `dtype` exists: JAX has float64 only on request."""
    if IS_JAX and dtype == "float64":
        return jax.enable_x64(True)
    return contextlib.nullcontext()


def tensor(array, dtype=None):
    """`array` as a tensor, rounded once to `dtype`."""
    if dtype in (None, "float16", "bfloat16"):
        return ops.cast(ops.convert_to_tensor(array), dtype or "float32")
    return ops.convert_to_tensor(np.asarray(array, dtype))


def array(value):
    """The values of a tensor or variable, or a number, as an array."""
    if isinstance(value, int):
        return np.asarray(value)
    if keras.backend.standardize_dtype(value.dtype) in ("float16", "bfloat16"):
        value = ops.cast(value, "float32")
    return np.asarray(ops.convert_to_numpy(value))


def dtype_of(value):
    return keras.backend.standardize_dtype(value.dtype)


def jitted(function):
    """`function` of tensors, compiled where the backend does so."""
    if IS_TENSORFLOW:
        return tf.function(function)
    return jax.jit(function) if IS_JAX else function


def quick(function):
    """`function`, compiled on JAX, where its steps one by one take longer."""
    return jax.jit(function) if IS_JAX else function


def pullback(function, tensors, output_gradient, create_graph=False):
    """What `function(*tensors)` returns, and gradients for `tensors`.

    `function` returns a tuple; the gradients are those of
    `sum(first of them * output_gradient)`.
    """
    if IS_TENSORFLOW:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            results = function(*tensors)
        return results, tape.gradient(results[0], tensors, output_gradient)
    if IS_JAX:

        def split(*tensors):
            outputs, *rest = function(*tensors)
            return outputs, rest

        outputs, vjp, rest = jax.vjp(split, *tensors, has_aux=True)
        return (outputs, *rest), vjp(output_gradient)
    if not create_graph:
        tensors = [t.detach().requires_grad_() for t in tensors]
    results = function(*tensors)
    return results, torch.autograd.grad(
        results[0], tensors, output_gradient, create_graph=create_graph
    )


def gradients(function, tensors, output_gradient):
    """`pullback` as arrays, in one compiled function on JAX."""

    def both(tensors, output_gradient):
        return pullback(function, tensors, output_gradient)

    results, of_tensors = quick(both)(list(tensors), output_gradient)
    return results, [array(g) for g in of_tensors]


def gradients_of_weights(model, inputs, output_gradient):
    """List of arrays: those of `sum(outputs * output_gradient)` in training.

    The model's state stays as it is, or on TensorFlow and PyTorch is that
    after the call.
    """
    weights = [v.value for v in model.trainable_variables]
    if IS_JAX:
        before = [v.value for v in model.non_trainable_variables]

        @jax.jit
        def run(weights, before):
            def call(weights):
                return model.stateless_call(
                    weights, before, inputs, training=True
                )[0]

            return jax.vjp(call, weights)[1](output_gradient)[0]

        found = run(weights, before)
    elif IS_TENSORFLOW:
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
        found = tape.gradient(outputs, weights, output_gradient)
    else:
        outputs = model(inputs, training=True)
        found = torch.autograd.grad(outputs, weights, output_gradient)
    return [array(x) for x in found]


def second_gradients(function, tensors, output_gradient, directions):
    """Gradients of the gradients.

    Those of `sum(g * d)` over the gradients `g` of `function` and the
    `directions`, for each of `tensors` and for `output_gradient`.
    """
    every = [*tensors, output_gradient]

    def projected(*every):
        *tensors, output_gradient = every
        _, of_tensors = pullback(function, tensors, output_gradient, True)
        return sum(ops.sum(g * d) for g, d in zip(of_tensors, directions))

    if IS_JAX:
        results = jax.jit(jax.grad(projected, range(len(every))))(*every)
    elif IS_TENSORFLOW:
        with tf.GradientTape() as tape:
            tape.watch(every)
            value = projected(*every)
        results = tape.gradient(value, every)
    else:
        every = [t.detach().requires_grad_() for t in every]
        results = torch.autograd.grad(projected(*every), every)
    return [array(r) for r in results]


@dataclasses.dataclass
class Step:
    """What one call of a layer in training gives."""

    outputs: np.ndarray
    input_gradient: np.ndarray
    weight_gradients: dict
    statistics: dict
    output_dtype: str


def training_step(
    layer, inputs, output_gradient=None, compiled=False, training=True, **kwargs
):
    """One call of `layer`, its gradients and new state.

    `output_gradient` is an array (default: ones). The layer's weights are
    those after the call.
    """
    if not layer.built:
        layer.build(tuple(inputs.shape))
    if output_gradient is None:
        output_gradient = np.ones(inputs.shape, "float32")
    return steps(layer, compiled, training)(inputs, output_gradient, **kwargs)


def steps(layer, compiled=False, training=True):
    """A function of `(inputs, output_gradient, **kwargs)`, a `training_step`.

    On JAX it is compiled once for all steps, so the layer's switches are those
    of the first; the layer is built.
    """
    names = [w.name for w in layer.trainable_variables]
    weights = [v.value for v in layer.trainable_variables]

    if IS_JAX:

        @jax.jit
        def run(weights, before, inputs, output_gradient, kwargs):
            def call(weights, inputs):
                return layer.stateless_call(
                    weights, before, inputs, training=training, **kwargs
                )

            outputs, vjp, state = jax.vjp(call, weights, inputs, has_aux=True)
            return outputs, vjp(output_gradient), state

    elif IS_TENSORFLOW:

        def run(inputs, output_gradient, kwargs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs, training=training, **kwargs)
            return outputs, tape.gradient(
                outputs, [weights, inputs], output_gradient
            )

        run = tf.function(run) if compiled else run

    def step(inputs, output_gradient, **kwargs):
        output_gradient = tensor(output_gradient, layer.compute_dtype)
        if IS_JAX:
            outputs, (of_weights, of_inputs), state = run(
                [v.value for v in layer.trainable_variables],
                [v.value for v in layer.non_trainable_variables],
                inputs,
                output_gradient,
                kwargs,
            )
            for variable, value in zip(layer.non_trainable_variables, state):
                variable.assign(value)
        elif IS_TENSORFLOW:
            outputs, (of_weights, of_inputs) = run(
                inputs, output_gradient, kwargs
            )
        else:
            inputs = inputs.detach().requires_grad_()
            outputs = layer(inputs, training=training, **kwargs)
            of_inputs, *of_weights = torch.autograd.grad(
                outputs, [inputs, *weights], output_gradient
            )
        return Step(
            outputs=array(outputs),
            input_gradient=array(of_inputs),
            weight_gradients={n: array(g) for n, g in zip(names, of_weights)},
            statistics={
                v.name: array(v.value) for v in layer.non_trainable_variables
            },
            output_dtype=dtype_of(outputs),
        )

    return step

"""A function of a model, compiled as its framework does it."""

import functools

import keras
from keras import ops


def compiled(model, function):
    """`function(*structures)` that may read the variables of `model`.

    Args:
        model: `keras.Model` or layer, built.
        function: Function of tensors, which it returns too, in structures.

    Returns:
        Function of arrays. On TensorFlow a `tf.function`, on JAX a `jax.jit`
        of the variables, on PyTorch `function` without gradients. Whatever it
        assigns to variables or adds to losses is dropped.
    """

    def stateless(*structures):
        with keras.StatelessScope():
            return function(*structures)

    def of_arrays(*structures):
        # None stands for an optional input that is left out.
        return run(
            *keras.tree.map_structure(
                lambda x: None if x is None else ops.convert_to_tensor(x),
                structures,
            )
        )

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        # TensorFlow warns of many traces, and counts together what has one
        # code; a partial has none. Keras's own functions go without autograph
        # too, which takes longer than tracing.
        run = tf.function(
            functools.partial(stateless),
            reduce_retracing=True,
            autograph=False,
        )
    elif backend == "jax":
        import jax

        @jax.jit
        def pure(values, *structures):
            with keras.StatelessScope(list(zip(model.variables, values))):
                return function(*structures)

        def run(*structures):
            return pure([v.value for v in model.variables], *structures)

    else:
        import torch

        run = torch.no_grad()(stateless)
    return of_arrays


def innermost_trace():
    """What tells the functions apart that are being traced in each other.

    The body of a loop is one. Its tensors mean nothing outside of it.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.compat.v1.get_default_graph()
    if backend == "jax":
        from jax.extend import core

        return core.get_opaque_trace_state(convention="flax")
    return None

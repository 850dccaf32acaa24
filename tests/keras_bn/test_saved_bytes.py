"""What stays in memory from the forward to the backward pass.

The inputs in their own dtype, a mask if there is one, and vectors per channel:
nothing else of the inputs' size.
"""

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

if frameworks.IS_TENSORFLOW:
    import tensorflow as tf

    # A view of these is not another tensor.
    _VIEWS = {"Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims"}

    def saved_bytes(layer, inputs, **kwargs):
        """Bytes of the forward tensors that the gradient's ops read."""

        @tf.function
        def saved_tensors(x, dy):
            graph = tf.compat.v1.get_default_graph()
            outputs = layer(x, training=True, **kwargs)
            forward = set(graph.get_operations())
            weights = [v.value for v in layer.trainable_variables]
            tf.gradients(outputs, [x, *weights], dy)
            saved = {}
            for op in set(graph.get_operations()) - forward:
                for tensor in op.inputs:
                    while tensor.op.type in _VIEWS:
                        tensor = tensor.op.inputs[tensor.value_index]
                    if tensor.op in forward and tensor.dtype != tf.resource:
                        saved[tensor.ref()] = tensor
            saved.pop(dy.ref(), None)
            return list(saved.values())

        return sum(
            t.dtype.size * int(tf.size(t))
            for t in saved_tensors(inputs, inputs)
        )

elif frameworks.IS_JAX:
    import jax

    def saved_bytes(layer, inputs, **kwargs):
        """Bytes of the arrays that the function for the gradient holds."""

        def run(weights, inputs):
            outputs, _ = layer.stateless_call(
                weights,
                [v.value for v in layer.non_trainable_variables],
                inputs,
                training=True,
                **kwargs,
            )
            return outputs

        # Compiled as one, for what XLA could drop to be dropped.
        weights = [v.value for v in layer.trainable_variables]
        _, vjp = jax.jit(lambda *a: jax.vjp(run, *a))(weights, inputs)
        leaves = {id(leaf): leaf for leaf in jax.tree_util.tree_leaves(vjp)}
        return sum(leaf.nbytes for leaf in leaves.values())

else:
    import torch

    def saved_bytes(layer, inputs, **kwargs):
        """Bytes of the storages that autograd keeps."""
        saved = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = inputs.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(inputs, training=True, **kwargs)
        return sum(saved.values())


SIZES = {"float32": 4, "mixed_float16": 2, "mixed_bfloat16": 2, "float64": 8}


def _saved(layer_class, shape, policy, mask=None, **kwargs):
    with frameworks.precision(policy):
        layer = layer_class(dtype=policy, **kwargs)
        layer.build(shape)
        dtype = layer.compute_dtype
        inputs = frameworks.tensor(np.random.normal(size=shape), dtype)
        if mask is not None:
            mask = keras.ops.convert_to_tensor(mask)
        return saved_bytes(layer, inputs, mask=mask)


@pytest.mark.parametrize("policy", SIZES)
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((64, 8, 8, 16), -1),
        ((64, 16, 8, 8), 1),
        ((64, 8, 16, 3), 2),
        ((512, 64), -1),
        ((64, 32, 16), -1),
        # Large enough for TensorFlow's fused op to be chosen.
        ((512, 8, 8, 16), -1),
        ((512, 16, 8, 8), 1),
    ],
)
def test_the_inputs_and_vectors_are_saved(shape, axis, policy):
    saved = _saved(keras_bn.BatchNormalization, shape, policy, axis=axis)
    size = SIZES[policy]
    inputs = size * int(np.prod(shape))
    vectors = 8 * max(size, 4) * shape[axis] + 64
    assert inputs <= saved <= inputs + vectors, saved / inputs


@pytest.mark.parametrize("policy", SIZES)
@pytest.mark.parametrize("channels_in_mask", [1, 16])
def test_under_a_mask_the_mask_is_saved_too(policy, channels_in_mask):
    shape = (64, 8, 8, 16)
    mask = np.random.default_rng(0).random((64, 8, 8, channels_in_mask)) < 0.5
    saved = _saved(keras_bn.BatchNormalization, shape, policy, mask)
    size = SIZES[policy]
    inputs = size * int(np.prod(shape))
    vectors = 8 * max(size, 4) * 16 + 64
    assert inputs <= saved <= inputs + mask.nbytes + vectors, saved / inputs


def test_with_renorm():
    shape = (64, 8, 8, 16)
    saved = _saved(
        keras_bn.BatchNormalization, shape, "mixed_float16", renorm=True
    )
    inputs = 2 * int(np.prod(shape))
    assert inputs <= saved <= inputs + 12 * 4 * 16


@pytest.mark.parametrize("policy", SIZES)
def test_frozen_layers_save_no_more_than_keras_does(policy):
    """Which on PyTorch and JAX is nothing of the inputs' size."""
    shape = (64, 8, 8, 16)
    ours, theirs = (
        _saved(layer_class, shape, policy, trainable=False)
        for layer_class in (
            keras_bn.BatchNormalization,
            keras.layers.BatchNormalization,
        )
    )
    assert ours <= theirs + 8 * max(SIZES[policy], 4) * 16 + 64


def test_the_measure_sees_what_keras_saves():
    """Else the other tests would pass whatever was saved."""
    shape = (64, 8, 8, 16)
    saved = _saved(keras.layers.BatchNormalization, shape, "mixed_bfloat16")
    assert saved >= 2 * 2 * np.prod(shape)

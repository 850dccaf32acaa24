"""Weights that change between the forward and the backward pass.

The gradients are those at the values that the forward pass had, whatever is
assigned afterwards: PyTorch assigns in place.
"""

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks
from tests.keras_bn.layer_in_numpy import LayerInNumPy

SHAPE = (6, 2, 3)

# Arguments of the layer, and whether the call is a training call.
MODES = [
    ({}, False),
    ({}, True),
    ({"trainable": False}, True),
    ({"use_moving_statistics": True}, True),
    ({"use_moving_statistics": True, "update_moving_statistics": False}, True),
    ({"use_moving_statistics": False}, False),
    ({"train_gamma_and_beta": False}, False),
    ({"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.4}}, True),
    ({"renorm": True, "renorm_clipping": keras_bn.renorm_schedule()}, True),
    ({"renorm": True, "scale": False}, True),
    ({"momentum": None}, True),
    ({"debias": True, "use_moving_statistics": True}, True),
    ({"virtual_batch_size": 4}, True),
    ({"virtual_batch_size": 3, "axis": 1}, True),
    ({"axis": (1, 2)}, True),
    ({"axis": (1, 2)}, False),
    ({"axis": 1, "synchronized": True}, True),
    ({"center": False}, False),
    ({"dtype": "float64"}, False),
    ({"dtype": "float64"}, True),
    ({"dtype": "mixed_bfloat16"}, False),
    ({"dtype": "mixed_bfloat16", "use_moving_statistics": True}, True),
]


def _values(seed, shape=SHAPE):
    """Above 0, so that they will do for a variance."""
    return np.random.default_rng(seed).uniform(0.5, 3.0, shape)


def _change(layer, inputs):
    """Whatever may be done to a layer between the two passes."""
    layer(inputs, training=True)
    weights = layer.trainable_variables
    if weights:
        gradients = [keras.ops.ones(w.shape, w.dtype) for w in weights]
        keras.optimizers.SGD(0.5).apply(gradients, weights)
    others = [_values(i, w.shape) for i, w in enumerate(layer.weights)]
    layer.set_weights(others)
    layer.load_own_variables(dict(zip(map(str, range(9)), others)))
    for weight in layer.weights:
        weight.assign(weight + 1.0)
    keras_bn.reset_statistics(layer)
    model = keras.Sequential([keras.Input(SHAPE[1:]), layer])
    keras_bn.recalibrate(model, _values(8), verbose=0, frozen=True)


def _pending(layer, inputs, training, **kwargs):
    """The outputs, and a function from their gradient to all others.

    Those of the inputs and of the weights, in a list.
    """
    weights = [v.value for v in layer.trainable_variables]
    if frameworks.IS_JAX:
        import jax

        before = [v.value for v in layer.non_trainable_variables]

        def call(weights, inputs):
            return layer.stateless_call(
                weights, before, inputs, training=training, **kwargs
            )[0]

        outputs, vjp = jax.vjp(call, weights, inputs)

        def pull(gradient):
            of_weights, of_inputs = vjp(gradient)
            return [of_inputs, *of_weights]

    elif frameworks.IS_TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=training, **kwargs)

        def pull(gradient):
            return tape.gradient(outputs, [inputs, *weights], gradient)

    else:
        import torch

        inputs = inputs.detach().requires_grad_()
        outputs = layer(inputs, training=training, **kwargs)

        def pull(gradient):
            return torch.autograd.grad(outputs, [inputs, *weights], gradient)

    return outputs, pull


def _name(mode):
    arguments, training = mode
    return "-".join([*arguments, f"training={training}"])


# JAX has no variable that is changed in place, and compiles for long.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "mode", MODES[: 2 if frameworks.IS_JAX else None], ids=_name
)
def test_gradients_of_the_forward_pass(mode, masked):
    arguments, training = mode
    with frameworks.precision(arguments.get("dtype")):
        check(arguments, training, masked)


def check(arguments, training, masked):
    layer = keras_bn.BatchNormalization(**arguments)
    layer.build(SHAPE)
    short = layer.compute_dtype == "bfloat16"
    inputs = frameworks.tensor(_values(0), layer.compute_dtype)
    output_gradient = frameworks.tensor(_values(1), layer.compute_dtype)
    channels = int(np.prod(layer.moving_mean.shape))
    vectors = {}
    for variable in (layer.gamma, layer.beta):
        if variable is not None:
            values = _values(2, channels).astype("float32")
            variable.assign(values.reshape(variable.shape))
            vectors[variable.name] = values
    mask = _values(3, (SHAPE[0], 1, 1)) < 2.0 if masked else None
    kwargs = {"mask": frameworks.tensor(mask, "bool")} if masked else {}
    options = {
        name: value
        for name, value in arguments.items()
        if name not in _NOT_OF_THE_FORMULA
    }
    if "renorm_step" in [w.name for w in layer.weights]:
        # What the schedule begins with.
        options["renorm_clipping"] = {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}

    outputs, pull = _pending(layer, inputs, training, **kwargs)
    _change(layer, inputs)
    found = [frameworks.array(g) for g in pull(output_gradient)]

    right = LayerInNumPy(channels, **vectors, **options)
    right.virtual_batch_size = arguments.get("virtual_batch_size")
    _, of_inputs, of_gamma, of_beta = right.call(
        frameworks.array(inputs),
        frameworks.array(output_gradient),
        mask,
        training and layer.trainable,
    )
    expected = {"gamma": of_gamma, "beta": of_beta}
    names = [w.name for w in layer.trainable_variables]
    # A gradient of the inputs that is bfloat16 was rounded to it.
    wide = 1e-11 if layer.compute_dtype == "float64" else 2e-5
    _close(found[0], of_inputs, 2**-8 if short else wide)
    for name, gradient in zip(names, found[1:], strict=True):
        _close(gradient, expected[name], wide)


_NOT_OF_THE_FORMULA = (
    "trainable",
    "train_gamma_and_beta",
    "scale",
    "center",
    "synchronized",
    "dtype",
)


def _close(found, expected, tolerance):
    expected = np.reshape(expected, found.shape)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, tolerance, atol)


@pytest.mark.parametrize("training", [False, True])
def test_as_with_keras_layer(training):
    """Clean and noisy passes of one loss, where Keras's layer has gradients."""
    found = []
    for layer in (
        keras.layers.BatchNormalization(),
        keras_bn.BatchNormalization(),
    ):
        layer.build(SHAPE)
        inputs = frameworks.tensor(_values(0))
        _, pull = _pending(layer, inputs, training)
        layer(frameworks.tensor(_values(4)), training=True)
        layer.moving_variance.assign([7.0] * 3)
        gradients = pull(frameworks.tensor(_values(1)))
        found.append([frameworks.array(g) for g in gradients])
    for ours, theirs in zip(*found[::-1], strict=True):
        np.testing.assert_allclose(ours, theirs, 1e-4, 1e-4)

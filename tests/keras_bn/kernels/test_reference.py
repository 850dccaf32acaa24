"""The reference itself, against what this project did not write.

Keras's layer in float64, finite differences, NumPy's own `mean` and `var`, and
PyTorch where it is installed.
"""

import importlib.util

import keras
import numpy as np
from hypothesis import given

from keras_bn.kernels import reference
from tests.keras_bn import frameworks
from tests.keras_bn.cases import cases

_FLOAT64 = ("float64",)
_HAS_TORCH = importlib.util.find_spec("torch") is not None


def _settings(case):
    return {"axis": case.axis, "epsilon": case.epsilon}


@given(cases(dtypes=_FLOAT64))
def test_moments_are_those_of_the_kept_values(case):
    inputs, *_, mask = case.data()
    mean, variance, count = reference.batch_moments(
        inputs, axis=case.axis, mask=mask
    )
    kept = np.ones(case.shape, bool) if mask is None else mask
    kept = np.broadcast_to(kept, case.shape)
    for channel in range(case.channels):
        values = np.take(inputs, channel, case.axis)
        values = values[np.take(kept, channel, case.axis)]
        assert count[channel] == values.size
        if values.size:
            np.testing.assert_allclose(mean[channel], values.mean(), 1e-12)
            np.testing.assert_allclose(
                variance[channel], values.var(), 1e-10, 1e-14
            )
        else:
            assert mean[channel] == variance[channel] == 0


@given(cases(dtypes=_FLOAT64, masks=(None,), min_batch=1))
def test_against_keras_in_float64(case):
    with frameworks.precision("float64"):
        # On JAX and PyTorch, Keras's layer computes in float32 even so.
        double = keras.backend.result_type("float64", "float32") == "float64"
        inputs, gradient, gamma, beta, _ = case.data()
        layer = keras.layers.BatchNormalization(
            axis=case.axis,
            epsilon=0.1,
            momentum=0.0,
            scale=gamma is not None,
            center=beta is not None,
            dtype="float64",
        )
        layer.build(case.shape)
        if gamma is not None:
            layer.gamma.assign(gamma)
        if beta is not None:
            layer.beta.assign(beta)
        step = frameworks.training_step(
            layer, frameworks.tensor(inputs, "float64"), gradient
        )
    settings = {"axis": case.axis, "epsilon": 0.1}
    outputs, mean, variance, _ = reference.normalize_batch(
        inputs, gamma, beta, **settings
    )
    of_inputs, of_gamma, of_beta = reference.normalize_batch_gradient(
        gradient, inputs, gamma, **settings
    )
    pairs = [
        (step.outputs, outputs),
        (step.statistics["moving_mean"], mean),
        (step.statistics["moving_variance"], variance),
        (step.input_gradient, of_inputs),
    ]
    if gamma is not None:
        pairs.append((step.weight_gradients["gamma"], of_gamma))
    if beta is not None:
        pairs.append((step.weight_gradients["beta"], of_beta))
    for actual, expected in pairs:
        accuracy = 1e-9 if double else 2e-4
        largest = np.abs(expected).max(initial=1.0)
        np.testing.assert_allclose(
            actual, expected, rtol=accuracy, atol=accuracy * largest
        )


@given(cases(dtypes=_FLOAT64, min_batch=1))
def test_gradients_are_those_of_the_outputs(case):
    """Along one direction, by finite differences; under masks too."""
    inputs, gradient, gamma, beta, mask = case.data()
    # A variance near 0 against epsilon bends too much for differences.
    settings = {"axis": case.axis, "epsilon": 0.1}
    generator = np.random.default_rng(case.seed)
    directions = [
        generator.normal(size=size)
        for size in (case.shape, case.channels, case.channels)
    ]
    step = 1e-5
    sums = []
    for sign in (1, -1):
        moved = [
            None if v is None else v + sign * step * d
            for v, d in zip((inputs, gamma, beta), directions)
        ]
        outputs, *_ = reference.normalize_batch(*moved, mask=mask, **settings)
        sums.append((outputs * gradient).sum())
    slope = (sums[0] - sums[1]) / (2 * step)
    results = reference.normalize_batch_gradient(
        gradient, inputs, gamma, mask=mask, **settings
    )
    expected = sum(
        (g * d).sum()
        for g, d, v in zip(results, directions, (inputs, gamma, beta))
        if v is not None
    )
    scale = np.abs(gradient).sum() + 1.0
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-7 * scale)


@given(cases(dtypes=_FLOAT64, masks=(None,), min_batch=1))
def test_inference_gradients_are_those_of_the_outputs(case):
    inputs, gradient, gamma, _, _ = case.data()
    generator = np.random.default_rng(case.seed)
    mean = generator.normal(size=case.channels)
    variance = generator.uniform(0.1, 4.0, case.channels)
    direction = generator.normal(size=case.shape)
    settings = _settings(case)
    # Linear in the inputs: differences are exact, whatever the step.
    outputs = [
        reference.normalize_with(x, mean, variance, gamma, None, **settings)
        for x in (inputs + direction, inputs)
    ]
    slope = (gradient * (outputs[0] - outputs[1])).sum()
    of_inputs, of_gamma, of_beta = reference.normalize_with_gradient(
        gradient, inputs, mean, variance, gamma, **settings
    )
    np.testing.assert_allclose(
        slope, (of_inputs * direction).sum(), rtol=1e-8, atol=1e-8
    )
    reduced = tuple(i for i in range(inputs.ndim) if i != case.axis)
    normalized = reference.normalize_with(
        inputs, mean, variance, None, None, **settings
    )
    np.testing.assert_allclose(
        of_gamma, (gradient * normalized).sum(reduced), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(of_beta, gradient.sum(reduced), atol=1e-12)


if _HAS_TORCH:
    import torch

    def test_against_pytorch_in_float64():
        generator = np.random.default_rng(0)
        inputs = generator.normal(2.0, 3.0, (4, 3, 5, 2))
        gradient = generator.normal(size=inputs.shape)
        gamma, beta = generator.normal(size=(2, 3))
        x, g, b = (
            torch.tensor(v, requires_grad=True) for v in (inputs, gamma, beta)
        )
        # PyTorch takes N / (N - 1) into its moving variance, ours does not.
        moments = torch.zeros(3).double(), torch.zeros(3).double()
        outputs = torch.nn.functional.batch_norm(
            x, *moments, g, b, training=True, momentum=1.0, eps=1e-3
        )
        outputs.backward(torch.tensor(gradient))
        expected, mean, variance, count = reference.normalize_batch(
            inputs, gamma, beta, axis=1, epsilon=1e-3
        )
        gradients = reference.normalize_batch_gradient(
            gradient, inputs, gamma, axis=1, epsilon=1e-3
        )
        pairs = [
            (outputs.detach(), expected),
            (moments[0], mean),
            (moments[1], variance * count / (count - 1)),
            *zip((x.grad, g.grad, b.grad), gradients),
        ]
        for actual, wanted in pairs:
            np.testing.assert_allclose(actual.numpy(), wanted, 1e-10, 1e-12)

"""The kernels of the backend against `reference.py`, over generated cases."""

import keras
import numpy as np
import pytest
from hypothesis import given

from keras_bn import kernels
from keras_bn.kernels import reference
from tests.keras_bn import frameworks
from tests.keras_bn.cases import Allowed
from tests.keras_bn.cases import Case
from tests.keras_bn.cases import assert_within
from tests.keras_bn.cases import cases

_UNMASKED = (None,)
_MASKED = ("positions", "rows", "full", "channels", "all", "nothing")


def _tensors(case, data):
    """The case's data as tensors, vectors in the dtype of the moments."""
    inputs, gradient, gamma, beta, mask = data
    wide = "float64" if case.dtype == "float64" else "float32"

    def vector(values):
        return None if values is None else frameworks.tensor(values, wide)

    return (
        frameworks.tensor(inputs, case.dtype),
        frameworks.tensor(gradient, case.dtype),
        vector(gamma),
        vector(beta),
        None if mask is None else keras.ops.convert_to_tensor(mask),
    )


def _check_moments(case, data, mean, variance, count):
    expected = reference.batch_moments(data[0], axis=case.axis, mask=data[-1])
    allowed = Allowed(case, data)
    wide = "float64" if case.dtype == "float64" else "float32"
    assert frameworks.dtype_of(mean) == wide
    assert frameworks.dtype_of(variance) == wide
    assert_within(frameworks.array(mean), expected[0], allowed.mean, "mean")
    assert_within(
        frameworks.array(variance), expected[1], allowed.variance, "variance"
    )
    shape = () if case.mask is None else (case.channels,)
    count = frameworks.array(count)
    assert count.shape == shape
    np.testing.assert_array_equal(
        np.broadcast_to(count, [case.channels]), expected[2]
    )


def check(case, handed_in=False):
    """Outputs, moments and gradients of one case against the reference."""
    data = case.data()
    inputs, gradient, gamma, beta, mask = _tensors(case, data)
    vectors = [v for v in (gamma, beta) if v is not None]

    def function(inputs, *vectors):
        vectors = list(vectors)
        settings = {"axis": case.axis, "mask": mask}
        if handed_in:
            settings["moments"] = kernels.batch_moments(inputs, **settings)
        return kernels.normalize_batch(
            inputs,
            None if gamma is None else vectors.pop(0),
            None if beta is None else vectors.pop(0),
            epsilon=case.epsilon,
            **settings,
        )

    (outputs, *moments), of_tensors = frameworks.gradients(
        function, [inputs, *vectors], gradient
    )
    assert frameworks.dtype_of(outputs) == case.dtype
    _check_moments(case, data, *moments)
    settings = {"axis": case.axis, "epsilon": case.epsilon, "mask": data[-1]}
    expected, *_ = reference.normalize_batch(
        data[0], data[2], data[3], **settings
    )
    allowed = Allowed(case, data)
    bound = allowed.rounded(allowed.outputs, expected)
    assert_within(frameworks.array(outputs), expected, bound, "outputs")

    of_inputs, of_gamma, of_beta = reference.normalize_batch_gradient(
        data[1], data[0], data[2], **settings
    )
    bound = allowed.rounded(allowed.input_gradient, of_inputs)
    assert_within(of_tensors.pop(0), of_inputs, bound, "gradient of inputs")
    if gamma is not None:
        assert_within(
            of_tensors.pop(0), of_gamma, allowed.gamma, "gradient of gamma"
        )
    if beta is not None:
        assert_within(
            of_tensors.pop(0), of_beta, allowed.beta, "gradient of beta"
        )


@given(cases())
def test_batch_moments(case):
    with frameworks.precision(case.dtype):
        data = case.data()
        inputs, *_, mask = _tensors(case, data)
        moments = frameworks.quick(
            lambda inputs: kernels.batch_moments(
                inputs, axis=case.axis, mask=mask
            )
        )(inputs)
        _check_moments(case, data, *moments)


@given(cases(masks=_UNMASKED))
def test_normalize_batch(case):
    with frameworks.precision(case.dtype):
        check(case)


@given(cases(masks=_MASKED))
def test_normalize_batch_under_a_mask(case):
    with frameworks.precision(case.dtype):
        check(case)


@given(cases())
def test_moments_handed_in(case):
    """As renormalization does: the moments are wanted before the outputs."""
    with frameworks.precision(case.dtype):
        check(case, handed_in=True)


@given(cases(masks=_UNMASKED))
def test_normalize_with(case):
    """Inference: the moments are constants."""
    with frameworks.precision(case.dtype):
        data = case.data()
        inputs, gradient, gamma, beta, _ = _tensors(case, data)
        vectors = [v for v in (gamma, beta) if v is not None]
        generator = np.random.default_rng(case.seed + 1)
        moments = [
            generator.normal(size=case.channels).astype("float32"),
            generator.uniform(0.01, 9.0, case.channels).astype("float32"),
        ]
        wide = "float64" if case.dtype == "float64" else "float32"
        settings = {"axis": case.axis, "epsilon": case.epsilon}

        def function(inputs, *vectors):
            vectors = list(vectors)
            outputs = kernels.normalize_with(
                inputs,
                *(frameworks.tensor(m, wide) for m in moments),
                None if gamma is None else vectors.pop(0),
                None if beta is None else vectors.pop(0),
                **settings,
            )
            return (outputs,)

        (outputs,), of_tensors = frameworks.gradients(
            function, [inputs, *vectors], gradient
        )
        assert frameworks.dtype_of(outputs) == case.dtype
        expected = reference.normalize_with(
            data[0], *moments, data[2], data[3], **settings
        )
        allowed = Allowed(case, data, (*moments, None))
        bound = allowed.rounded(allowed.outputs, expected)
        assert_within(frameworks.array(outputs), expected, bound, "outputs")
        of_inputs, of_gamma, of_beta = reference.normalize_with_gradient(
            data[1], data[0], *moments, data[2], **settings
        )
        bound = allowed.rounded(allowed.input_gradient, of_inputs)
        assert_within(of_tensors[0], of_inputs, bound, "gradient of inputs")
        if beta is not None:
            assert_within(
                of_tensors[-1], of_beta, allowed.beta, "gradient of beta"
            )
        if gamma is not None:
            assert_within(
                of_tensors[1], of_gamma, allowed.gamma, "gradient of gamma"
            )


@pytest.mark.parametrize("mask", [None, "positions", "full"])
@pytest.mark.parametrize(
    "shape, axis", [((4, 3), 1), ((3, 2, 2, 3), 1), ((3, 2, 2, 4), 3)]
)
def test_second_derivatives(shape, axis, mask):
    """As gradient penalties take them; against finite differences."""
    case = Case(shape=shape, axis=axis, mask=mask, far=0.5, seed=3)
    data = case.data()
    inputs, gradient, gamma, beta, kept = _tensors(case, data)
    generator = np.random.default_rng(7)
    directions = [
        generator.normal(size=size).astype("float32")
        for size in (shape, case.channels)
    ]
    settings = {"axis": axis, "epsilon": case.epsilon}

    actual = frameworks.second_gradients(
        lambda inputs, gamma: kernels.normalize_batch(
            inputs, gamma, beta, mask=kept, **settings
        ),
        [inputs, gamma],
        gradient,
        [frameworks.tensor(d) for d in directions],
    )

    def projected(inputs, gamma, gradient):
        results = reference.normalize_batch_gradient(
            gradient, inputs, gamma, mask=data[-1], **settings
        )
        return sum((g * d).sum() for g, d in zip(results, directions))

    arguments = [data[0], data[2], data[1]]
    arguments = [np.asarray(a, np.float64) for a in arguments]
    names = ["inputs", "gamma", "gradient"]
    for i, got in enumerate(actual):
        expected = finite_differences(projected, arguments, i)
        scale = np.abs(expected).max()
        assert_within(got, expected, 2e-5 * scale, names[i])


def finite_differences(function, arguments, which):
    """The gradient of a scalar function for one argument, central."""
    step = 1e-5
    result = np.zeros_like(arguments[which])
    for place in np.ndindex(result.shape):
        values = []
        for sign in (1, -1):
            moved = [a.copy() for a in arguments]
            moved[which][place] += sign * step
            values.append(function(*moved))
        result[place] = (values[0] - values[1]) / (2 * step)
    return result


@pytest.mark.parametrize("shape", [(16, 3), (2049, 64), (2049, 65)])
def test_the_moments_handed_to_normalize_with_get_gradients(shape):
    generator = np.random.default_rng(0)
    inputs = generator.normal(1.0, 2.0, shape)
    output_gradient = generator.normal(size=shape)
    mean, beta = generator.normal(size=(2, shape[1]))
    variance, gamma = generator.uniform(0.5, 2.0, (2, shape[1]))
    inverse = 1 / np.sqrt(variance + 1e-3)
    normalized = (inputs - mean) * inverse
    of_beta = output_gradient.sum(0)
    of_gamma = (output_gradient * normalized).sum(0)
    expected = [
        -of_beta * gamma * inverse,
        -of_gamma * gamma * inverse**2 / 2,
        of_gamma,
        of_beta,
    ]

    def outputs(mean, variance, gamma, beta):
        return (
            kernels.normalize_with(
                frameworks.tensor(inputs),
                mean,
                variance,
                gamma,
                beta,
                axis=1,
                epsilon=1e-3,
            ),
        )

    _, found = frameworks.gradients(
        outputs,
        [frameworks.tensor(v) for v in (mean, variance, gamma, beta)],
        frameworks.tensor(output_gradient),
    )
    for ours, right in zip(found, expected):
        np.testing.assert_allclose(ours, right, 1e-3, 1e-2)

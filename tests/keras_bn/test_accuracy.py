"""Rounding error at the sizes and means that training meets.

A mean that is large against the deviation, many positions, and many equal
values are what makes sums lose digits. Up to 100 deviations the layer has to be
about as exact as Keras's on TensorFlow; beyond, where Keras's has few digits
left, its moments are held to what float32 can say.

The order in which terms are added differs from one CPU to another, by its
vector instructions, its number of cores, and whether TensorFlow uses oneDNN.
So nothing here is measured on one of them: a sum may be as far off as one of
`FEW` terms that are added one after the other.
"""

import functools

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn import kernels
from keras_bn.kernels import reference
from tests.keras_bn import frameworks
from tests.keras_bn.cases import assert_within

SHAPES = [
    (128, 32, 32, 32),
    (128, 16, 16, 64),
    (32, 56, 56, 256),
    (128, 1024),
]
QUANTITIES = ("mean", "variance", "outputs", "inputs", "gamma", "beta")
EPSILON = 1e-3
UNIT = 2.0**-24  # of float32
FEW = 1024

# What `errors(keras.layers.BatchNormalization, shape, far)` below gave on
# TensorFlow 2.21 with Keras 3.15.1 and two threads: the measure for backends
# on which TensorFlow is absent.
KERAS_ON_TENSORFLOW = {
    # mean, variance, outputs, inputs, gamma, beta
    ((128, 32, 32, 32), 0): (1.7e-8, 4.3e-6, 1.0e-5, 1.0e-5, 1.2e-3, 1.8e-3),
    ((128, 32, 32, 32), 100): (2.6e-4, 4.3e-6, 3.2e-4, 1.1e-5, 0.15, 1.8e-3),
    ((128, 16, 16, 64), 0): (1.8e-8, 2.0e-6, 6.6e-6, 6.5e-6, 1.1e-3, 3.8e-4),
    ((128, 16, 16, 64), 100): (1.7e-4, 1.1e-6, 1.8e-4, 1.2e-5, 0.085, 3.8e-4),
    ((32, 56, 56, 256), 0): (1.3e-8, 4.0e-6, 7.6e-6, 7.7e-6, 1.6e-3, 2.5e-3),
    ((32, 56, 56, 256), 100): (3.2e-4, 3.6e-6, 3.3e-4, 1.4e-5, 0.27, 2.5e-3),
    ((128, 1024), 0): (3.4e-8, 2.9e-7, 7.2e-7, 8.8e-7, 6.4e-6, 5.2e-6),
    ((128, 1024), 100): (1.9e-5, 2.1e-7, 4.0e-5, 2.5e-5, 7.6e-4, 5.2e-6),
}


@functools.lru_cache(maxsize=1)
def _deviations(shape):
    return np.random.default_rng(0).standard_normal(shape, "float32")


@functools.lru_cache(maxsize=1)
def _output_gradient(shape):
    return np.random.default_rng(1).standard_normal(shape, "float32")


def _vectors(channels):
    generator = np.random.default_rng(2)
    return [
        generator.normal(1.0, 0.2, channels).astype("float32"),
        generator.normal(0.0, 1.0, channels).astype("float32"),
    ]


def errors(layer_class, shape, far):
    """The largest error of each quantity, the right moments, and how far the
    sums that are the gradients of gamma and beta may be off.

    In the large tensors 8 channels are looked at, for the time float64 takes.
    """
    inputs = _deviations(shape) + np.float32(far)
    output_gradient = _output_gradient(shape)
    gamma, beta = _vectors(shape[-1])
    layer = layer_class(momentum=0.0, epsilon=EPSILON)
    layer.build(shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    step = frameworks.training_step(
        layer, frameworks.tensor(inputs), output_gradient
    )

    few = 8 if inputs.size > 2**20 else shape[-1]
    some = slice(None, None, shape[-1] // few)
    settings = {"axis": len(shape) - 1, "epsilon": EPSILON}
    inputs, output_gradient = inputs[..., some], output_gradient[..., some]
    gamma, beta = gamma[some], beta[some]
    outputs, mean, variance, _ = reference.normalize_batch(
        inputs, gamma, beta, **settings
    )
    expected = dict(
        zip(
            ("inputs", "gamma", "beta"),
            reference.normalize_batch_gradient(
                output_gradient, inputs, gamma, **settings
            ),
        ),
        mean=mean,
        variance=variance,
        outputs=outputs,
    )
    actual = {
        "mean": step.statistics["moving_mean"],
        "variance": step.statistics["moving_variance"],
        "outputs": step.outputs,
        "inputs": step.input_gradient,
        **step.weight_gradients,
    }
    found = {
        q: float(np.abs(actual[q][..., some] - expected[q]).max())
        for q in QUANTITIES
    }
    normalized = (inputs - mean) / np.sqrt(variance + EPSILON)
    sums = {"gamma": output_gradient * normalized, "beta": output_gradient}
    sums = {q: float(error_of_sums(x).max()) for q, x in sums.items()}
    return found, {q: expected[q] for q in ("mean", "variance")}, sums


def error_of_sums(terms):
    """How far the sums over the first axis may be off, for each channel.

    An addition is off by `UNIT` times its result at most. Such errors are as
    good as independent, and their sum is beyond 6 times the root of the sum of
    their squares in less than one of 10^7 sums (Azuma's inequality; Higham &
    Mary, "A new approach to probabilistic rounding error analysis", 2019).
    """
    terms = terms.reshape(-1, terms.shape[-1]).astype("float64")
    parts = np.split(terms, range(FEW, len(terms), FEW))
    partial = [np.cumsum(part, 0) for part in parts]
    partial.append(np.cumsum([sums[-1] for sums in partial], 0))
    squares = sum(np.square(sums).sum(0) for sums in partial)
    return 6 * UNIT * np.sqrt(squares)


@pytest.mark.parametrize("far", [0, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_beside_those_of_keras_on_tensorflow(shape, far):
    recorded = dict(zip(QUANTITIES, KERAS_ON_TENSORFLOW[shape, far]))
    if frameworks.IS_TENSORFLOW:
        keras_errors, *_ = errors(keras.layers.BatchNormalization, shape, far)
        for quantity, value in recorded.items():
            assert 0.1 < keras_errors[quantity] / value < 10, quantity
    else:
        keras_errors = recorded
    found, _, sums = errors(keras_bn.BatchNormalization, shape, far)
    # The deviation is 1: moments closer than this are exact.
    least = {"mean": UNIT, "variance": UNIT, **sums}
    for quantity in QUANTITIES:
        allowed = max(3 * keras_errors[quantity], least.get(quantity, 0.0))
        assert found[quantity] <= allowed, (quantity, found, keras_errors)


@pytest.mark.parametrize("far", [1e3, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_of_far_data(shape, far):
    found, expected, _ = errors(keras_bn.BatchNormalization, shape, far)
    ulp = np.spacing(np.float32(far))
    assert found["mean"] <= 4 * ulp
    assert found["variance"] <= 1e-4 * expected["variance"].min()
    # The mean's error is all that the outputs may show of it.
    assert found["outputs"] <= 2 * (4 * ulp) + 1e-4


# How far the variance may be off, relatively, where a channel has outliers or
# several clusters. Keras's layer on TensorFlow is off by up to 1.1e-3 on the
# same data.
_VARIANCE = 2e-5
_UNIT = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def check_far(inputs, dtype="float32", mask=None, mean_error=1e-5):
    """Moments, outputs and gradients of channels last.

    `mean_error` is in deviations, besides 4 ulp.
    """
    generator = np.random.default_rng(5)
    channels = inputs.shape[-1]
    gradient = frameworks.array(
        frameworks.tensor(generator.normal(size=inputs.shape), dtype)
    )
    gamma = generator.normal(1.0, 0.2, channels).astype("float32")
    beta = generator.normal(size=channels).astype("float32")
    settings = {"axis": inputs.ndim - 1, "epsilon": EPSILON}
    tensors = [frameworks.tensor(v) for v in (gamma, beta)]
    mask_tensor = None if mask is None else keras.ops.convert_to_tensor(mask)
    (outputs, *moments), (of_inputs, *_) = frameworks.gradients(
        lambda *tensors: kernels.normalize_batch(
            *tensors, mask=mask_tensor, **settings
        ),
        [frameworks.tensor(inputs, dtype), *tensors],
        frameworks.tensor(gradient, dtype),
    )
    outputs = frameworks.array(outputs)
    mean, variance, _ = (frameworks.array(m) for m in moments)
    expected, mean_, variance_, _ = reference.normalize_batch(
        inputs, gamma, beta, mask=mask, **settings
    )
    ulp = np.spacing(np.abs(mean_).astype("float32"))
    deviation = np.sqrt(variance_ + EPSILON)
    assert_within(mean, mean_, 4 * ulp + mean_error * deviation, "mean")
    assert (variance >= 0).all()
    allowed = _VARIANCE * variance_ + (32 * ulp) ** 2
    assert_within(variance, variance_, allowed, "variance")

    # In deviations: the mean's error, the variance's, the result's rounding.
    normalized = np.abs(inputs - mean_) / deviation
    moved = 4 * ulp / deviation + mean_error
    scaled = np.abs(gamma) * (moved + _VARIANCE * normalized)
    unit = _UNIT[dtype]
    allowed = scaled + 2 * unit * (np.abs(expected) + np.abs(beta))
    assert_within(outputs, expected, allowed, "outputs")
    expected, *_ = reference.normalize_batch_gradient(
        gradient, inputs, gamma, mask=mask, **settings
    )
    allowed = np.abs(gamma) / deviation * (
        (4 * unit + _VARIANCE) * np.abs(gradient)
        + 1e-5
        + (moved + _VARIANCE) * (1e-2 + 0.1 * normalized)
    ) + unit * np.abs(expected)
    assert_within(of_inputs, expected, allowed, "gradient of inputs")


def _ordinary(rows=65536, channels=4):
    shape = (rows // 1024, 32, 32, channels)
    return np.random.default_rng(4).standard_normal(shape, "float32")


def _one_channel_far():
    inputs = _ordinary()
    inputs[..., 2] += 1e4
    return inputs


def _one_channel_far_below_zero():
    inputs = _ordinary()
    inputs[..., 2] -= 1e4
    return inputs


def _first_rows_outliers():
    inputs = _ordinary()
    inputs[0] += 1e4
    return inputs


def _zeros_then_far():
    inputs = _ordinary() + np.float32(1e4)
    inputs[:32] = 0
    return inputs


def _far_then_zeros():
    return _zeros_then_far()[::-1].copy()


def _few_zeros_then_far():
    inputs = _ordinary() + np.float32(1e4)
    inputs[0, 0] = 0
    return inputs


def _zeros_at_even_distances():
    """Wherever a few of the values are looked at first, they mislead."""
    inputs = _ordinary() + np.float32(1e4)
    inputs[2::4, 16, 16] = 0
    inputs[::4, 0, 0] = 0
    return inputs


def _one_huge_outlier():
    inputs = _ordinary()
    inputs[5, 3, 3, :] = 1e6
    return inputs


def _far_in_steps():
    """Each sample about another mean, as batches sorted by class are."""
    inputs = _ordinary()
    steps = 100 * np.arange(len(inputs), dtype="float32")
    return inputs + steps[:, None, None, None]


def _tiny():
    return _ordinary() * np.float32(1e-3) + np.float32(0.3)


def _constant_channels():
    inputs = _ordinary()
    inputs[..., 0] = 0.0
    inputs[..., 1] = 1e4 + 0.1
    inputs[..., 3] = -1e-3
    return inputs


@pytest.mark.parametrize(
    "data",
    [
        _one_channel_far,
        _one_channel_far_below_zero,
        _first_rows_outliers,
        _zeros_then_far,
        _far_then_zeros,
        _few_zeros_then_far,
        _zeros_at_even_distances,
        _one_huge_outlier,
        _far_in_steps,
        _tiny,
        _constant_channels,
    ],
)
@pytest.mark.parametrize("mask", [None, "positions", "full"])
def test_data_made_to_defeat_a_shift(data, mask):
    inputs = data()
    check_far(inputs, mask=_half(mask, inputs.shape))


def _half(kind, shape):
    """A mask that is the same for all channels, or another for each."""
    if kind is None:
        return None
    channels = 1 if kind == "positions" else shape[-1]
    generator = np.random.default_rng(6)
    return generator.random((*shape[:-1], channels)) < 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_short_dtypes_about_a_large_mean(dtype, masked):
    """The values are coarse, their moments are not."""
    inputs = _ordinary() * np.float32([1, 1, 4, 1]) + np.float32(
        [0, 3, 100, -20]
    )
    inputs = frameworks.array(frameworks.tensor(inputs, dtype))
    mask = None
    if masked:
        mask = np.random.default_rng(6).random((*inputs.shape[:3], 1)) < 0.5
    # TensorFlow's fused op is left alone below a mean of 8 deviations.
    naive = frameworks.IS_TENSORFLOW and not masked
    check_far(inputs, dtype, mask, 5e-4 if naive else 1e-5)


@pytest.mark.parametrize("mask", [None, "positions", "full"])
@pytest.mark.parametrize("batch", [4, 128])
def test_mostly_equal_values(batch, mask):
    """As images with a background: every addition is rounded the same way.

    Sums of positive terms are off by a share of `FEW * UNIT / 2` at most where
    `FEW` of them are added one after the other. The variance may be the
    difference of the mean square and the square of the mean.
    """
    shape = (batch, 32, 32, 32)
    generator = np.random.default_rng(4)
    inputs = generator.standard_normal(shape, "float32")
    background = generator.standard_normal(shape[-1], "float32")
    is_background = generator.random((*shape[:-1], 1)) < 0.95
    inputs = np.where(is_background, background, inputs)
    mask = _half(mask, shape)
    expected, expected_variance, _ = reference.batch_moments(
        inputs, axis=3, mask=mask
    )
    mean, variance, _ = kernels.batch_moments(
        frameworks.tensor(inputs),
        axis=3,
        mask=None if mask is None else keras.ops.convert_to_tensor(mask),
    )
    share = FEW * UNIT / 2
    size, *_ = reference.batch_moments(np.abs(inputs), axis=3, mask=mask)
    assert_within(frameworks.array(mean), expected, share * size, "mean")
    square = expected_variance + np.square(expected)
    allowed = share * (square + 2 * np.abs(expected) * size)
    assert_within(
        frameworks.array(variance), expected_variance, allowed, "variance"
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_dtypes_with_one_channel_about_a_large_mean(dtype, masked):
    """Subtracting a mean would round the values of the other channels."""
    inputs = _ordinary() * np.float32([1, 1, 1, 4]) + np.float32(
        [0, 0.01, -0.02, 1000]
    )
    inputs = frameworks.array(frameworks.tensor(inputs, dtype))
    mask = _half("positions", inputs.shape) if masked else None
    check_far(inputs, dtype, mask)


@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stays_in_its_channel(value, far):
    inputs = _ordinary(4096) + np.float32(far)
    clean = np.array(inputs)
    inputs[1, 2, 3, 1] = value
    settings = {"axis": 3, "epsilon": EPSILON}
    with np.errstate(invalid="ignore"):
        expected = reference.batch_moments(inputs, axis=3)
    gradient = np.random.default_rng(1).normal(size=inputs.shape)

    def run(inputs):
        return frameworks.gradients(
            lambda x: kernels.normalize_batch(x, None, None, **settings),
            [frameworks.tensor(inputs)],
            frameworks.tensor(gradient),
        )

    (outputs, mean, variance, _), (of_inputs,) = run(inputs)
    (outputs_, *_), (of_inputs_,) = run(clean)
    mean, variance = frameworks.array(mean), frameworks.array(variance)
    others = [0, 2, 3]
    np.testing.assert_allclose(mean[others], expected[0][others], 1e-6, 1e-6)
    np.testing.assert_allclose(variance[others], expected[1][others], rtol=1e-4)
    assert not np.isfinite(mean[1])
    assert np.isnan(variance[1])
    for got, wanted in [
        (frameworks.array(outputs), frameworks.array(outputs_)),
        (of_inputs, of_inputs_),
    ]:
        np.testing.assert_allclose(
            got[..., others], wanted[..., others], atol=0.02
        )
        assert not np.isfinite(got[..., 1]).any()


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, 1e30, np.finfo(np.float32).min]
)
@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize(
    "rows, kind", [(4096, "full"), (65536, "positions"), (65536, "full")]
)
def test_what_masked_positions_hold_does_not_matter(value, far, rows, kind):
    """Padding may hold anything; only the kept positions are looked at."""
    inputs = _ordinary(rows) + np.float32(far)
    mask = _half(kind, inputs.shape)
    kept = np.broadcast_to(mask, inputs.shape)
    inputs[~kept] = value
    settings = {"axis": 3, "epsilon": EPSILON}
    # A loss that leaves out the padding sends no gradient there.
    gradient = np.random.default_rng(1).normal(size=inputs.shape) * kept
    gamma = np.float32([1.0, 0.5, 2.0, 1.5])
    mask_tensor = keras.ops.convert_to_tensor(mask)
    (outputs, mean, variance, _), of_tensors = frameworks.gradients(
        lambda x, gamma: kernels.normalize_batch(
            x, gamma, None, mask=mask_tensor, **settings
        ),
        [frameworks.tensor(inputs), frameworks.tensor(gamma)],
        frameworks.tensor(gradient),
    )
    clean = np.where(kept, inputs, np.float32(far))
    expected, mean_, variance_, _ = reference.normalize_batch(
        clean, gamma, None, mask=mask, **settings
    )
    np.testing.assert_allclose(
        frameworks.array(mean), mean_, rtol=4e-7, atol=1e-6
    )
    np.testing.assert_allclose(frameworks.array(variance), variance_, rtol=1e-4)
    atol = 1e-5 + 4e-7 * far
    outputs = frameworks.array(outputs)
    np.testing.assert_allclose(
        outputs[kept], expected[kept], rtol=1e-4, atol=atol
    )
    of_inputs, of_gamma, _ = reference.normalize_batch_gradient(
        gradient, clean, gamma, mask=mask, **settings
    )
    np.testing.assert_allclose(of_tensors[0], of_inputs, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        of_tensors[1], of_gamma, rtol=1e-3, atol=0.01 + 64 * 4e-7 * far
    )


@pytest.mark.parametrize("kind", ["positions", "full"])
def test_a_steep_gradient_makes_nothing_of_what_is_masked(kind):
    """Products of masked values are not finite, and are not looked at."""
    inputs = _ordinary()
    kept = np.broadcast_to(_half(kind, inputs.shape), inputs.shape)
    gradient = 100 * inputs * kept
    inputs[~kept] = np.finfo(np.float32).max
    mask = keras.ops.convert_to_tensor(_half(kind, inputs.shape))
    _, (of_inputs,) = frameworks.gradients(
        lambda x: kernels.normalize_batch(
            x, None, None, axis=3, epsilon=EPSILON, mask=mask
        ),
        [frameworks.tensor(inputs)],
        frameworks.tensor(gradient),
    )
    assert np.isfinite(of_inputs[kept]).all()
    np.testing.assert_array_equal(of_inputs[~kept], 0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(5000, 4), (20000, 4), (256, 16, 16, 2)])
def test_channels_of_one_value(shape, masked):
    """Rounding must not make a variance negative, nor an output NaN."""
    inputs = np.ones(shape, "float32") * np.geomspace(1e3, 1e6, shape[-1])
    mask = None
    if masked:
        mask = frameworks.tensor(np.arange(shape[0]) % 3 > 0, "bool")
        mask = keras.ops.reshape(mask, (-1, *[1] * (len(shape) - 1)))
    layer = keras_bn.BatchNormalization(momentum=0.0)
    inputs = frameworks.tensor(inputs)
    outputs = layer(inputs, training=True, mask=mask)
    assert np.isfinite(frameworks.array(outputs)).all()
    assert frameworks.array(layer.moving_variance).min() >= 0.0
    assert np.isfinite(frameworks.array(layer(inputs))).all()

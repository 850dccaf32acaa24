"""Cumulative, debiased and unbiased moving statistics."""

import itertools

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.kernels import reference
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KINDS = [
    {"momentum": 0.9},
    {"momentum": None},
    {"momentum": 0.9, "debias": True},
    {"momentum": 0.0, "debias": True},
    {"momentum": 1.0, "debias": True},
]


def expected_average(values, initial, momentum, debias=False):
    """What the kind of average makes of a list of vectors, by its formula."""
    if momentum is None or (momentum == 1.0 and debias):
        return np.mean(values, 0)
    moving = 0.0 if debias else initial
    for value in values:
        moving = momentum * moving + (1 - momentum) * value
    return moving / (1 - momentum ** len(values)) if debias else moving


def _train(layer, inputs, **kwargs):
    return frameworks.training_step(
        layer, frameworks.tensor(inputs), **kwargs
    ).statistics


def _batches(sizes, channels=3):
    generator = np.random.default_rng(0)
    return [
        generator.normal(i + 1.0, i + 2.0, (size, channels)).astype("float32")
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_moving_statistics_by_their_formula(kind, unbiased):
    layer = OURS(unbiased_variance=unbiased, **kind)
    batches = _batches([8, 5, 2, 16])
    for batch in batches:
        statistics = _train(layer, batch)
    wide = [batch.astype("float64") for batch in batches]
    mean = expected_average([x.mean(0) for x in wide], 0.0, **kind)
    variance = expected_average(
        [x.var(0, ddof=int(unbiased)) for x in wide], 1.0, **kind
    )
    np.testing.assert_allclose(statistics["moving_mean"], mean, 1e-5)
    np.testing.assert_allclose(statistics["moving_variance"], variance, 1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_renorm(kind, unbiased):
    """The standard deviation is what is averaged."""
    layer = OURS(renorm=True, unbiased_variance=unbiased, **kind)
    batches = _batches([8, 5, 2])
    for batch in batches:
        statistics = _train(layer, batch)
    variances = [x.astype("float64").var(0, ddof=unbiased) for x in batches]
    stddev = expected_average(
        [np.sqrt(v + layer.epsilon) for v in variances], 1.0, **kind
    )
    np.testing.assert_allclose(statistics["moving_stddev"], stddev, 1e-5)
    np.testing.assert_allclose(
        statistics["moving_variance"], stddev**2 - layer.epsilon, 1e-4
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_batches_in_which_nothing_counts(kind):
    """One that is empty, one that is masked in the second channel alone."""
    layer = OURS(**kind)
    first, second, third = _batches([8, 4, 4])
    mask = np.ones((4, 3), bool)
    mask[:, 1] = False
    _train(layer, first)
    _train(layer, np.zeros((0, 3), "float32"))
    statistics = _train(layer, second, mask=frameworks.tensor(mask, "bool"))
    statistics = _train(layer, third)
    for channel, seen in enumerate(
        [[first, second, third], [first, third], [first, second, third]]
    ):
        mean = expected_average(
            [x[:, channel].astype("float64").mean() for x in seen], 0.0, **kind
        )
        np.testing.assert_allclose(
            statistics["moving_mean"][channel], mean, 1e-5
        )


def test_unbiased_variance_of_what_a_mask_leaves():
    layer = OURS(momentum=0.0, unbiased_variance=True)
    (batch,) = _batches([6])
    mask = np.array([[True], [False], [True], [True], [False], [False]])
    statistics = _train(layer, batch, mask=frameworks.tensor(mask, "bool"))
    _, variance, count = reference.batch_moments(batch, axis=1, mask=mask)
    np.testing.assert_allclose(
        statistics["moving_variance"], variance * count / (count - 1), 1e-5
    )


def test_unbiased_variance_of_one_position():
    layer = OURS(momentum=0.5, unbiased_variance=True)
    statistics = _train(layer, np.full((1, 3), 7.0, "float32"))
    np.testing.assert_allclose(statistics["moving_variance"], [0.5] * 3)


def test_the_counter_does_not_drift():
    """float32 would stop counting at 2 ** 24."""
    layer = OURS(momentum=None)
    layer.build((None, 3))
    layer.num_batches_tracked.assign([2**24] * 3)
    for batch in _batches([4, 4, 4]):
        statistics = _train(layer, batch)
    counted = statistics["num_batches_tracked"]
    assert counted.tolist() == [2**24 + 3] * 3
    assert np.issubdtype(counted.dtype, np.integer)


@pytest.mark.parametrize(
    "kwargs",
    [
        {**kind, "unbiased_variance": unbiased, "renorm": renorm}
        for kind, unbiased, renorm in itertools.product(
            KINDS[1:3], [False, True], [False, True]
        )
    ],
    ids=str,
)
def test_saved_whole_and_trained_on(kwargs, tmp_path):
    """What was counted before is known afterwards."""
    model = keras.Sequential([keras.Input((3,)), OURS(**kwargs)])
    model.compile("sgd", "mse")
    first, second = _batches([32, 16])
    model.fit(first, first, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for m in (model, loaded):
        m.fit(second, second, batch_size=8, shuffle=False, verbose=0)
    for ours, right in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(ours, right)
    layer = loaded.layers[-1]
    assert layer.get_config() == model.layers[-1].get_config()
    assert np.all(frameworks.array(layer.num_batches_tracked) == 6)


def test_no_average_of_a_kind_that_means_nothing():
    with pytest.raises(ValueError, match="momentum=None, debias=True"):
        OURS(momentum=None, debias=True)

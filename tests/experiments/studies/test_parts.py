"""The networks and measures of single studies, beside NumPy."""

import types

import keras
import numpy as np
import pytest
from keras import ops

from experiments import data
from experiments.studies import covariate_shift
from experiments.studies import recurrent_layers
from experiments.studies import small_networks
from experiments.studies import transfer
from experiments.studies.learning_rate import largest_stable
from experiments.studies.small_networks import Architecture
from experiments.studies.study_layers import MomentsPenalty
from experiments.studies.study_layers import ShiftingNoise

_RANDOM = np.random.default_rng(0)
_IMAGES = _RANDOM.standard_normal((6, 16, 16, 3)).astype("float32")


def _numpy(value):
    return np.array(ops.convert_to_numpy(value), np.float64)


def test_the_small_network():
    model = small_networks.build(Architecture("batch"), seed=0)
    names = [layer.name for layer in model.layers]
    assert [x for x in names if "conv" in x or "normalize" in x] == [
        "conv_0",
        "normalize_0",
        "conv_1",
        "normalize_1",
        "conv_2",
        "normalize_2",
        "normalize_3",
    ]
    assert model(_IMAGES).shape == (6, 10)
    deep = small_networks.build(Architecture(depth=3), seed=0)
    assert sum("conv" in layer.name for layer in deep.layers) == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": kind}
        for kind in small_networks.NORMALIZATIONS
    ]
    + [
        {"normalization": "batch", "layer": "keras"},
        {"normalization": "batch", "placement": "input"},
        {"normalization": "batch", "augment": True, "dropout": 0.4},
        {"normalization": "batch", "noise": True},
        {"penalty": 0.1},
    ],
    ids=str,
)
def test_kernels_begin_alike_whatever_else_differs(changes):
    expected = small_networks.build(Architecture(), seed=3)
    model = small_networks.build(Architecture(**changes), seed=3)
    assert model(_IMAGES, training=True).shape == (6, 10)
    for name in ("conv_0", "conv_2", "dense_3", "logits"):
        np.testing.assert_array_equal(
            _numpy(model.get_layer(name).kernel),
            _numpy(expected.get_layer(name).kernel),
        )


def test_the_initial_scale():
    one = small_networks.build(Architecture(), seed=1)
    ten = small_networks.build(Architecture(initial_scale=10.0), seed=1)
    for a, b in zip(one.get_weights(), ten.get_weights()):
        np.testing.assert_allclose(10 * a, b, atol=1e-5)


def test_normalizing_between_steps():
    """Each batch by the moments of the one before; the first by none."""
    layer = small_networks.normalization(
        Architecture("previous_batch"), False, "between"
    )
    first, second = _RANDOM.normal(2.0, 3.0, (2, 8, 4, 4, 5)).astype("float32")
    layer(first, training=True)
    found = _numpy(layer(second, training=True))
    axes, past = (0, 1, 2), first.astype(np.float64)
    deviation = np.sqrt(past.var(axes) + 1e-3)
    expected = (second - past.mean(axes)) / deviation
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_penalty():
    inputs = _RANDOM.normal(1.0, 2.0, (8, 3, 3, 4))
    layer = MomentsPenalty(0.5)
    layer(inputs.astype("float32"), training=True)
    mean, variance = inputs.mean((0, 1, 2)), inputs.var((0, 1, 2))
    expected = 0.5 * np.mean(mean**2 + (variance - 1) ** 2)
    (found,) = layer.losses
    np.testing.assert_allclose(_numpy(found), expected, rtol=1e-5)


def test_the_noise_moves_each_channel_anew():
    inputs = _RANDOM.standard_normal((400, 2, 2, 3)).astype("float32")
    layer = ShiftingNoise(seed=0)
    np.testing.assert_array_equal(_numpy(layer(inputs)), inputs)
    first, second = (_numpy(layer(inputs, training=True)) for _ in range(2))
    axes = (0, 1, 2)
    for outputs in (first, second):
        assert (np.abs(outputs.mean(axes)) < 0.65).all()
        assert (outputs.std(axes) > 0.9).all()
        assert (outputs.std(axes) < 1.45).all()
    assert np.abs(first.mean(axes) - second.mean(axes)).max() > 0.05


@pytest.mark.parametrize("normalization", ["batch_recurrent", "layer"])
def test_the_normalized_lstm(normalization):
    model = recurrent_layers.build(normalization, "keras_bn", 5, seed=0)
    layer = model.layers[1]
    sequence = _IMAGES.reshape(6, 8, -1).astype(np.float64)
    found = _numpy(layer(sequence.astype("float32"), training=True))
    names = ("_w", "_u", "_bias", "_beta")
    w, u, bias, beta = (_numpy(getattr(layer, name)) for name in names)
    gammas = [_numpy(x) for x in layer._gammas]
    axis = 0 if normalization == "batch_recurrent" else -1

    def norm(x):
        mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-3)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    h, c = np.zeros((2, 6, 5))
    for step in range(8):
        gates = gammas[0] * norm(sequence[:, step] @ w) + bias
        gates += gammas[1] * norm(h @ u)
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(gammas[2] * norm(c) + beta)
    np.testing.assert_allclose(found, h, atol=1e-4)


def test_the_largest_stable_rate():
    rates = [0.1, 1.0, 10.0]
    assert largest_stable(rates, [0.5, 0.6, 0.55]) == 1.0
    # Half of the way from the second to the third.
    assert largest_stable(rates, [0.5, 0.6, 0.4]) == pytest.approx(0.5)
    assert largest_stable(rates, [0.5, 0.1, 0.1]) == pytest.approx(-0.75)


def test_the_gradient_of_a_probe():
    """Beside that of softmax regression, on paper."""
    images = _RANDOM.integers(0, 256, (20, 2, 2, 3)).astype(np.uint8)
    labels = _RANDOM.integers(0, 10, 20).astype(np.int32)
    digits = data.Dataset(images, labels, images, labels, "digits", "1", "")

    def network():
        model = keras.Sequential([keras.Input((2, 2, 3))])
        model.add(keras.layers.Flatten())
        model.add(keras.layers.Dense(10, use_bias=False))
        return model

    settings = types.SimpleNamespace(input="standardized", network=network)
    probe = covariate_shift._Probe(settings, digits)
    inputs, _ = probe._batches[0]
    x = inputs.reshape(20, -1).astype(np.float64)
    logits = x @ _numpy(probe._twin.trainable_variables[0])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = x.T @ (shares - np.eye(10)[labels]) / 20
    (found,) = probe._gradient(inputs, labels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_halves_of_the_classes():
    labels = np.arange(10, dtype=np.int32)
    images = labels.reshape(10, 1, 1, 1).astype(np.uint8)
    whole = data.Dataset(images, labels, images, labels, "digits", "1", "")
    for classes, first in ((slice(5), 0), (slice(5, None), 5)):
        half = transfer._half(whole, classes)
        assert half.train_labels.tolist() == [0, 1, 2, 3, 4]
        chosen = list(range(first, first + 5))
        assert half.test_images.ravel().tolist() == chosen

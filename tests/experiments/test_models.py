"""The article's network."""

import keras
import numpy as np
import pytest

import keras_bn
from experiments import ExperimentError
from experiments import article
from experiments import models

# 5x5 kernels over 3 and 32 channels, 8 * 8 * 64 = 4096 features, 10 logits;
# batch normalization has four vectors, two of them trained.
_PLAIN = (75 * 32 + 32) + (800 * 64 + 64) + (4096 * 1024 + 1024) + 10_250
_CONV, _DENSE = 32 + 64, 1024


def _build(number, **arguments):
    arguments.setdefault("layer", "keras")
    return models.build(article.CONDITIONS[number], **arguments)


@pytest.mark.parametrize(
    ("number", "normalized"),
    [(0, 0), (4, _CONV), (8, _DENSE), (9, _CONV + _DENSE)],
)
def test_parameter_counts(number, normalized):
    model = _build(number)
    assert model.count_params() == _PLAIN + 4 * normalized
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert trained == _PLAIN + 2 * normalized


def test_layers_of_the_network_with_everything():
    model = _build(11)
    assert [type(layer).__name__ for layer in model.layers] == [
        "Conv2D",
        "BatchNormalization",
        "MaxPooling2D",
        "Conv2D",
        "BatchNormalization",
        "MaxPooling2D",
        "Flatten",
        "Dense",
        "BatchNormalization",
        "Dropout",
        "Dense",
    ]
    assert [layer.output.shape[1:] for layer in model.layers] == [
        (32, 32, 32),
        (32, 32, 32),
        (16, 16, 32),
        (16, 16, 64),
        (16, 16, 64),
        (8, 8, 64),
        (4096,),
        (1024,),
        (1024,),
        (1024,),
        (10,),
    ]
    for index in (0, 3, 7):
        # The activation is within the layer: normalization comes after it.
        assert model.layers[index].activation is keras.activations.relu
    assert model.layers[-1].activation is keras.activations.linear
    for index in (1, 4, 8):
        assert model.layers[index].momentum == 0.99
        assert model.layers[index].epsilon == 1e-3
    assert model.layers[9].rate == 0.4


def test_layers_of_the_network_with_nothing():
    kinds = {type(layer).__name__ for layer in _build(0).layers}
    assert kinds == {"Conv2D", "MaxPooling2D", "Flatten", "Dense"}


def test_initial_weights():
    model = _build(11)
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            *window, fan_in, fan_out = kernel.shape
            size = int(np.prod(window))
            limit = np.sqrt(6 / (size * (fan_in + fan_out)))
            assert 0.95 * limit < np.abs(kernel).max() < 1.00001 * limit
            assert not np.any(keras.ops.convert_to_numpy(layer.bias))


def _kernels(model):
    return {
        layer.name: keras.ops.convert_to_numpy(layer.kernel)
        for layer in model.layers
        if hasattr(layer, "kernel")
    }


@pytest.mark.parametrize(
    "other", [{"number": 0}, {"number": 11, "layer": "keras_bn"}]
)
def test_the_same_seed_gives_the_same_initial_kernels(other):
    one, another = (
        _kernels(_build(11, seed=3)),
        _kernels(_build(**other, seed=3)),
    )
    assert list(one) == ["conv1", "conv2", "dense", "logits"] == list(another)
    for name in one:
        np.testing.assert_array_equal(one[name], another[name])


def test_another_seed_gives_other_kernels():
    one, another = _kernels(_build(0, seed=0)), _kernels(_build(0, seed=1))
    for name in one:
        assert np.mean(one[name] == another[name]) < 0.01


def test_choice_of_layer():
    ours, kerass = _build(9, layer="keras_bn"), _build(9, layer="keras")
    assert type(ours.layers[1]) is keras_bn.BatchNormalization
    assert type(kerass.layers[1]) is keras.layers.BatchNormalization
    with pytest.raises(ExperimentError, match="Received: layer='flax'"):
        _build(9, layer="flax")


def test_other_images_and_classes():
    model = _build(0, input_shape=(8, 12, 1), classes=3)
    logits = model(np.zeros((2, 8, 12, 1), np.float32))
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("before", ["Conv2D", "BatchNormalization", "ReLU", "MaxPooling2D"]),
        ("input", ["BatchNormalization", "Conv2D", "MaxPooling2D", "Conv2D"]),
    ],
)
def test_placement(placement, expected):
    model = _build(9, placement=placement)
    assert [type(layer).__name__ for layer in model.layers[:4]] == expected
    count = {"before": 3, "input": 1}[placement]
    kinds = [type(layer) for layer in model.layers]
    assert kinds.count(keras.layers.BatchNormalization) == count
    for layer in model.layers:
        if placement == "before" and layer.name in ("conv1", "dense"):
            assert layer.activation is keras.activations.linear
    # The kernels are those of the article's place.
    assert _kernels(model).keys() == _kernels(_build(9)).keys()
    for name, kernel in _kernels(_build(9)).items():
        np.testing.assert_array_equal(_kernels(model)[name], kernel)


def test_conditions_without_normalization_have_no_place_for_it():
    for placement in ("before", "input"):
        kinds = [type(x) for x in _build(0, placement=placement).layers]
        assert kinds == [type(x) for x in _build(0).layers]

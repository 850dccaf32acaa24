"""Errors say what was received, in one line, and Keras's stay Keras's."""


import keras
import numpy as np
import pytest

import keras_bn

OURS = keras_bn.BatchNormalization


@pytest.mark.parametrize(
    "kwargs, received",
    [
        ({"axis": 1.5}, "axis=1.5"),
        ({"axis": "last"}, "axis='last'"),
        ({"axis": None}, "axis=None"),
        ({"axis": True}, "axis=True"),
        ({"axis": ()}, "axis=()"),
        ({"axis": (1, 1.5)}, "axis=(1, 1.5)"),
        ({"axis": [1, None]}, "axis=[1, None]"),
        ({"axis": float("nan")}, "axis=nan"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"epsilon": -1e-3}, "epsilon=-0.001"),
        ({"epsilon": float("inf")}, "epsilon=inf"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"renorm_momentum": 2}, "renorm_momentum=2"),
        ({"axis_name": 3}, "axis_name=3"),
        (
            {"renorm": True, "renorm_clipping": {"max": 1}},
            "{'max': 1}",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}},
            "rmax=1, rmin=2",
        ),
        ({"renorm": True, "renorm_clipping": {"dmax": -1}}, "dmax=-1"),
        ({"renorm": True, "renorm_clipping": {"rmax": -1}}, "rmax=-1"),
        (
            {"renorm": True, "renorm_clipping": {"rmax": float("nan")}},
            "rmax=nan",
        ),
        ({"renorm": True, "renorm_clipping": {"rmin": True}}, "rmin=True"),
        ({"renorm": True, "renorm_clipping": 3}, "renorm_clipping=3"),
        ({"renorm": "a"}, "renorm='a'"),
        ({"synchronized": "yes"}, "synchronized='yes'"),
        ({"debias": None}, "debias=None"),
        ({"unbiased_variance": 3}, "unbiased_variance=3"),
        ({"center": "no"}, "center='no'"),
        ({"scale": []}, "scale=[]"),
    ],
    ids=lambda v: str(v),
)
def test_arguments(kwargs, received):
    with pytest.raises(ValueError) as error:
        OURS(**kwargs)
    message = str(error.value)
    assert received in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name, value",
    [
        (name, value)
        for name in ("momentum", "epsilon", "renorm_momentum")
        for value in ("much", None, [0.5])
        if (name, value) != ("momentum", None)
    ],
)
def test_numbers_that_are_not(name, value):
    """Whatever the kind of error, it names the argument."""
    with pytest.raises((TypeError, ValueError), match=name):
        OURS(**{name: value})


def test_an_integral_float_is_an_axis():
    """As `numpy` arithmetic gives them; Keras takes these as well."""
    for axis in (1.0, np.int64(1), np.float32(1)):
        layer = OURS(axis=axis)
        assert layer.axis == 1
        assert type(layer.get_config()["axis"]) is int


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"renorm": True, "renorm_clipping": {"max": 1}}, "invalid keys"),
        (
            {"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}},
            "rmax should be greater than rmin",
        ),
        (
            {"renorm": True, "renorm_clipping": {"dmax": -1}},
            "dmax should be non-negative",
        ),
    ],
    ids=str,
)
def test_errors_that_keras_has_too(kwargs, message):
    for layer in (keras.layers.BatchNormalization, OURS):
        with pytest.raises(ValueError, match=message):
            layer(**kwargs)


def test_clipping_is_not_looked_at_without_renorm():
    for layer in (keras.layers.BatchNormalization, OURS):
        assert layer(renorm_clipping={"max": 1}).renorm_clipping == {"max": 1}


@pytest.mark.parametrize("axis", [3, -4, 100])
def test_an_axis_the_inputs_do_not_have(axis):
    with pytest.raises(ValueError) as error:
        OURS(axis=axis)(np.ones((2, 3, 4), "float32"))
    assert f"axis={axis}" in str(error.value)
    assert "(2, 3, 4)" in str(error.value)
    for layer in (keras.layers.BatchNormalization, OURS):
        with pytest.raises(ValueError, match="out of bounds"):
            layer(axis=axis).compute_output_shape((2, 3, 4))


@pytest.mark.parametrize(
    "axis, message",
    [
        ((1, -2), "same axis twice"),
        ((0, 1, 2), "must leave an axis"),
        ((1, 3), "Axis 3 is out of bounds"),
    ],
)
def test_several_axes_that_mean_nothing(axis, message):
    with pytest.raises(ValueError, match=message) as error:
        OURS(axis=axis).build((None, 4, 3))
    assert f"axis={list(axis)}" in str(error.value)
    assert "(None, 4, 3)" in str(error.value)


def test_several_axes_one_of_unknown_size():
    with pytest.raises(ValueError, match="must be known"):
        OURS(axis=(1, 2)).build((None, None, 3))


@pytest.mark.parametrize("shape", [(3,), ()])
def test_a_rank_below_two(shape):
    with pytest.raises(ValueError, match="rank 2") as error:
        OURS().build(shape)
    assert str(shape) in str(error.value)


def test_an_unknown_number_of_channels():
    inputs = keras.Input((None, None))
    with pytest.raises(ValueError, match="must be known") as error:
        OURS()(inputs)
    assert "(None, None, None)" in str(error.value)
    with pytest.raises(ValueError, match="must be known"):
        OURS(axis=1)(inputs)


def test_inputs_unlike_those_it_was_built_for():
    layer = OURS()
    layer.build((None, 4, 3))
    with pytest.raises(ValueError, match="ndim"):
        layer(np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match="axis"):
        layer(np.ones((2, 4, 5), "float32"))


@pytest.mark.parametrize(
    "shape, axis, mask_shape, message",
    [
        ((4, 6, 3), -1, (4, 5), "broadcastable"),
        ((4, 6, 3), -1, (4, 6, 2), "broadcastable"),
        ((4, 6, 3), -1, (4,), "one dimension less"),
        ((4, 6, 3), -1, (4, 6, 3, 1), "one dimension less"),
        ((4, 6, 6), 1, (4, 6), "both fit"),
        ((4, 3, 6), 1, (4, 5), "broadcastable"),
        # These two would broadcast the inputs.
        ((4, 1, 3), -1, (4, 5), "broadcastable"),
        ((1, 6, 3), -1, (4, 6, 1), "broadcastable"),
    ],
)
def test_a_mask_of_another_shape(shape, axis, mask_shape, message):
    layer = OURS(axis=axis)
    for training in (True, False):
        with pytest.raises(ValueError, match=message) as error:
            layer(
                np.ones(shape, "float32"),
                training=training,
                mask=np.ones(mask_shape, bool),
            )
        first = str(error.value)
        for part in (f"{mask_shape}", f"{shape}"):
            assert part in first, first

"""The layer beside `keras.layers.BatchNormalization`, call by call."""

import inspect

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_bn
from tests.keras_bn import frameworks
from tests.keras_bn.cases import cases

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization

CLIPPING = {"rmax": 2.0, "rmin": 0.5, "dmax": 0.3}
# Arguments that both layers take.
ARGUMENTS = [
    {},
    {"axis": 1},
    {"axis": -2, "momentum": 0.5, "epsilon": 1e-5},
    {"center": False},
    {"scale": False},
    {"center": False, "scale": False},
    {
        "beta_initializer": "ones",
        "gamma_initializer": keras.initializers.Constant(0.5),
        "moving_mean_initializer": keras.initializers.Constant(0.25),
        "moving_variance_initializer": keras.initializers.Constant(4.0),
    },
    {"beta_regularizer": "l2", "gamma_regularizer": keras.regularizers.L1(0.1)},
    {
        "beta_constraint": keras.constraints.NonNeg(),
        "gamma_constraint": keras.constraints.MinMaxNorm(0.2, 0.8),
    },
    {"renorm": True},
    {"renorm": True, "renorm_clipping": CLIPPING, "renorm_momentum": 0.5},
    {"renorm": True, "renorm_clipping": {"dmax": 0.1}, "scale": False},
    {"renorm": True, "renorm_clipping": {"rmin": 1.5}, "center": False},
    {"renorm": True, "moving_variance_initializer": "zeros"},
    {"momentum": 0.0},
    {"momentum": 1, "epsilon": 0},
    {"trainable": False, "name": "frozen"},
    {"dtype": "mixed_bfloat16"},
]


def _twins(shape, **kwargs):
    """Keras's layer and ours with the same weights, not those of the start."""
    keras_layer, ours = KERAS(**kwargs), OURS(**kwargs)
    keras_layer.build(shape)
    ours.build(shape)
    generator = np.random.default_rng(11)
    weights = [
        generator.uniform(0.5, 2.0, w.shape) for w in keras_layer.weights
    ]
    keras_layer.set_weights(weights)
    ours.set_weights(keras_layer.get_weights())
    return keras_layer, ours


def _close(actual, expected, dtype="float32", what=""):
    tolerance = {
        "float16": 2e-3,
        "bfloat16": 1.6e-2,
        "float32": 2e-5,
        "float64": 2e-5,
    }[dtype]
    scale = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * scale, err_msg=what
    )


def _same_step(keras_layer, ours, inputs, gradient, **kwargs):
    expected, actual = (
        frameworks.training_step(layer, inputs, gradient, **kwargs)
        for layer in (keras_layer, ours)
    )
    dtype = ours.compute_dtype
    assert actual.output_dtype == expected.output_dtype
    _close(actual.outputs, expected.outputs, dtype, "outputs")
    _close(actual.input_gradient, expected.input_gradient, dtype, "inputs")
    assert list(actual.weight_gradients) == list(expected.weight_gradients)
    for name, value in expected.weight_gradients.items():
        _close(actual.weight_gradients[name], value, dtype, name)
    assert list(actual.statistics) == list(expected.statistics)
    for name, value in expected.statistics.items():
        _close(actual.statistics[name], value, what=name)
    return actual


# Arguments, weights, config.


def test_public_names():
    assert keras_bn.__all__ == [
        "BatchNormalization",
        "RecalibrateStatistics",
        "StatisticsMonitor",
        "audit",
        "convert",
        "export_saved_model",
        "fold",
        "freeze",
        "recalibrate",
        "renorm_schedule",
        "reset_statistics",
        "thaw",
        "watch_statistics",
    ]
    assert not issubclass(OURS, KERAS)
    assert issubclass(OURS, keras.layers.Layer)


def test_arguments_and_defaults_are_those_of_keras():
    theirs = inspect.signature(KERAS.__init__).parameters
    ours = inspect.signature(OURS.__init__).parameters
    assert [n for n in ours if n in theirs] == list(theirs)
    positional = [n for n in theirs if n != "kwargs"]
    assert list(ours)[: len(positional)] == positional
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
    assert [n for n in ours if n not in theirs] == [
        "axis_name",
        "virtual_batch_size",
        "unbiased_variance",
        "debias",
        "use_moving_statistics",
        "update_moving_statistics",
        "train_gamma_and_beta",
    ]
    call = inspect.signature(KERAS.call).parameters
    assert list(inspect.signature(OURS.call).parameters) == list(call)


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=",".join)
def test_weights_and_config_are_those_of_keras(kwargs):
    theirs, ours = KERAS(**kwargs), OURS(**kwargs)
    expected, actual = theirs.get_config(), ours.get_config()
    if "name" not in kwargs:
        assert expected.pop("name").startswith("batch_normalization")
        assert actual.pop("name").startswith("batch_normalization")
    assert actual == expected

    for layer in (theirs, ours):
        layer.build((None, 3, 4))

    def described(weights):
        return [
            (w.path.split("/")[-1], w.shape, w.dtype, w.trainable)
            for w in weights
        ]

    assert described(ours.weights) == described(theirs.weights)
    assert described(ours.variables) == described(theirs.variables)
    assert described(ours.trainable_weights) == described(
        theirs.trainable_weights
    )
    for a, b in zip(ours.get_weights(), theirs.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert ours.input_spec.ndim == theirs.input_spec.ndim == 3
    assert ours.compute_output_shape((2, 3, 4)) == (2, 3, 4)
    assert ours.supports_masking
    assert ours.count_params() == theirs.count_params()


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=",".join)
def test_config_moves_both_ways(kwargs):
    config = OURS(**kwargs).get_config()
    again = OURS.from_config(config)
    assert again.get_config() == config
    assert KERAS.from_config(config).get_config() == config
    assert OURS.from_config(KERAS.from_config(config).get_config())
    serialized = keras.saving.serialize_keras_object(OURS(**kwargs))
    restored = keras.saving.deserialize_keras_object(serialized)
    assert type(restored) is OURS


@pytest.mark.parametrize("renorm", [False, True])
def test_weights_move_both_ways(renorm):
    theirs, ours = KERAS(renorm=renorm), OURS(renorm=renorm)
    inputs = frameworks.tensor(np.random.default_rng(0).normal(2, 3, (8, 5)))
    theirs(inputs, training=True)
    ours.build((8, 5))
    ours.set_weights(theirs.get_weights())
    _close(frameworks.array(ours(inputs)), frameworks.array(theirs(inputs)))
    ours(inputs, training=True)
    theirs.set_weights(ours.get_weights())
    _close(frameworks.array(ours(inputs)), frameworks.array(theirs(inputs)))


# Training and inference over generated cases.


@given(
    cases(dtypes=("float32",), masks=(None,), min_batch=2, max_far=5.0),
    st.booleans(),
)
def test_training_is_that_of_keras(case, from_the_back):
    inputs, gradient, *_ = case.data()
    axis = case.axis - len(case.shape) * from_the_back
    layers = _twins(
        case.shape,
        axis=axis,
        epsilon=case.epsilon,
        momentum=0.7,
        scale=case.gamma,
        center=case.beta,
    )
    # Two equal values have no variance but that of rounding.
    if case.channels < inputs.size:
        _same_step(*layers, frameworks.tensor(inputs), gradient)


@given(cases(dtypes=("float32",), masks=(None,), max_far=5.0), st.booleans())
def test_inference_is_that_of_keras(case, from_the_back):
    inputs, *_ = case.data()
    theirs, ours = _twins(
        case.shape,
        axis=case.axis - len(case.shape) * from_the_back,
        epsilon=case.epsilon,
        scale=case.gamma,
        center=case.beta,
    )
    before = ours.get_weights()
    inputs = frameworks.tensor(inputs)
    for training in (False, None):
        _close(
            frameworks.array(ours(inputs, training=training)),
            frameworks.array(theirs(inputs, training=training)),
        )
    for now, then in zip(ours.get_weights(), before):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(
    "clipping", [None, CLIPPING, {"rmin": 1.2}, {"rmax": 0.9}, {"dmax": 0.05}]
)
@pytest.mark.parametrize("affine", [True, False])
def test_renorm_is_that_of_keras(clipping, affine):
    shape = (6, 3, 4)
    layers = _twins(
        shape,
        renorm=True,
        renorm_clipping=clipping,
        renorm_momentum=0.6,
        momentum=0.8,
        center=affine,
        scale=affine,
    )
    generator = np.random.default_rng(3)
    for _ in range(3):
        inputs = frameworks.tensor(generator.normal(1.0, 2.0, shape))
        _same_step(*layers, inputs, generator.normal(size=shape))
    _close(*(frameworks.array(layer(inputs)) for layer in layers))


def test_renorm_of_a_constant_channel_from_a_variance_of_zero():
    """The moving standard deviation is less than the root of epsilon then."""
    inputs = frameworks.tensor(np.ones((6, 4)))
    for layer_class in (KERAS, OURS):
        layer = layer_class(renorm=True, moving_variance_initializer="zeros")
        step = frameworks.training_step(layer, inputs)
        variance = step.statistics["moving_variance"]
        np.testing.assert_array_equal(variance, [0.0] * 4)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize(
    "shape, mask_shape",
    [((8, 5), (8,)), ((4, 6, 3), (4, 6))]
    + [((4, 3, 2, 5), (4, 3, 2)), ((4, 3, 2, 5), (4, 1, 2))],
)
def test_masks_are_those_of_keras(shape, mask_shape, renorm):
    generator = np.random.default_rng(3)
    mask = keras.ops.convert_to_tensor(generator.random(mask_shape) < 0.6)
    layers = _twins(shape, renorm=renorm, momentum=0.5)
    inputs = frameworks.tensor(generator.normal(size=shape))
    gradient = generator.normal(size=shape)
    _same_step(*layers, inputs, gradient, mask=mask)
    # Of any dtype: what is not 0 is kept.
    mask = keras.ops.cast(mask, "int32") * 2
    _same_step(*layers, inputs, gradient, mask=mask)


def test_a_mask_through_masking():
    """`keras.layers.Masking` and `Embedding` hand it on by themselves."""
    inputs = np.random.default_rng(3).normal(size=(4, 6, 3)).astype("float32")
    inputs[1, 4:] = inputs[3, 2:] = 0.0
    layers = _twins((None, 6, 3), momentum=0.0)
    results = []
    for layer in layers:
        model = keras.Sequential([keras.layers.Masking(), layer])
        model.build((None, 6, 3))
        outputs = model(frameworks.tensor(inputs), training=True)
        results.append((outputs, layer.moving_mean, layer.moving_variance))
    for theirs, ours in zip(*results):
        _close(frameworks.array(ours), frameworks.array(theirs))
    kept = (inputs != 0).any(-1)
    _close(frameworks.array(layers[1].moving_mean), inputs[kept].mean(0))
    _close(frameworks.array(layers[1].moving_variance), inputs[kept].var(0))


def test_masks_where_the_channels_are_not_last():
    """One axis less, or the full rank; statistics of the kept positions."""
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=(4, 3, 6)).astype("float32")
    positions = generator.random((4, 6)) < 0.6
    for mask in (positions, positions[:, None]):
        layer = OURS(axis=1, momentum=0.0)
        layer(
            frameworks.tensor(inputs),
            training=True,
            mask=keras.ops.convert_to_tensor(mask),
        )
        kept = np.moveaxis(inputs, 1, -1)[positions]
        _close(frameworks.array(layer.moving_mean), kept.mean(0))
        _close(frameworks.array(layer.moving_variance), kept.var(0))


def test_a_mask_made_by_masking_where_the_channels_are_not_last():
    """It lacks the last axis, which is not the channels'."""
    inputs = np.random.default_rng(3).normal(size=(4, 6, 3)).astype("float32")
    inputs[1, 4:] = 0.0
    layer = OURS(axis=1, momentum=0.0)
    model = keras.Sequential([keras.layers.Masking(), layer])
    model.build((None, 6, 3))
    model(frameworks.tensor(inputs), training=True)
    for channel in range(6):
        kept = (
            inputs[[0, 2, 3], channel] if channel >= 4 else inputs[:, channel]
        )
        np.testing.assert_allclose(
            frameworks.array(layer.moving_mean)[channel],
            kept.mean(),
            rtol=1e-5,
            atol=1e-6,
        )


# Dtypes.


@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float64", "float32"]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_policies_are_those_of_keras(policy, dtype):
    """Outputs in the compute dtype, whatever comes in; a float32 variable."""
    shape = (16, 3, 4)
    generator = np.random.default_rng(3)
    with frameworks.precision(policy):
        layers = _twins(shape, dtype=policy, momentum=0.5)
        inputs = frameworks.tensor(generator.normal(1.0, 2.0, shape), dtype)
        gradient = generator.normal(size=shape)
        step = _same_step(*layers, inputs, gradient)
        assert step.output_dtype == layers[1].compute_dtype
        outputs = [layer(inputs) for layer in layers]
        assert frameworks.dtype_of(outputs[1]) == layers[1].compute_dtype
        _close(
            *(frameworks.array(v) for v in outputs[::-1]),
            layers[1].compute_dtype,
        )
        for theirs, ours in zip(*(layer.weights for layer in layers)):
            assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
def test_short_dtypes_keep_float32_statistics(policy):
    layer = OURS(dtype=policy, momentum=0.0)
    inputs = np.random.default_rng(3).normal(100.0, 40.0, (64, 3, 4))
    inputs = frameworks.tensor(inputs, policy)
    outputs = layer(inputs, training=True)
    assert frameworks.dtype_of(outputs) == policy
    assert layer.gamma.dtype == layer.beta.dtype == policy
    assert layer.moving_mean.dtype == layer.moving_variance.dtype == "float32"
    values = frameworks.array(inputs).astype("float64")
    _close(frameworks.array(layer.moving_mean), values.mean((0, 1)))
    _close(frameworks.array(layer.moving_variance), values.var((0, 1)))
    _close(
        frameworks.array(outputs),
        (values - values.mean((0, 1))) / np.sqrt(values.var((0, 1)) + 1e-3),
        policy,
    )


def test_weights_are_not_rounded_to_the_compute_dtype():
    """In bfloat16 this gamma is 1 and nothing would be left."""
    layer = OURS(dtype="mixed_bfloat16", epsilon=0.0)
    layer.build((4, 3))
    layer.gamma.assign([1 + 2.0**-9] * 3)
    layer.beta.assign([-1.0] * 3)
    outputs = layer(frameworks.tensor(np.ones((4, 3)), "bfloat16"))
    np.testing.assert_array_equal(frameworks.array(outputs), 2.0**-9)
    layer.gamma.assign([1.0] * 3)
    layer.beta.assign([-1.0 - 2.0**-9] * 3)
    outputs = layer(frameworks.tensor(np.ones((4, 3)), "bfloat16"))
    np.testing.assert_array_equal(frameworks.array(outputs), -(2.0**-9))


def test_autocast_is_that_of_keras():
    inputs = frameworks.tensor(np.ones((4, 3)), "float32")
    for autocast in (True, False):
        dtypes = [
            frameworks.dtype_of(
                layer(dtype="mixed_bfloat16", autocast=autocast)(inputs)
            )
            for layer in (KERAS, OURS)
        ]
        assert dtypes == ["bfloat16", "bfloat16"]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float64"])
def test_inputs_of_other_dtypes(dtype):
    values = np.random.default_rng(3).integers(0, 2, (16, 3)) * 3
    layers = _twins((16, 3), momentum=0.5)
    outputs = [layer(values.astype(dtype), training=True) for layer in layers]
    assert frameworks.dtype_of(outputs[1]) == "float32"
    _close(frameworks.array(outputs[1]), frameworks.array(outputs[0]))
    for theirs, ours in zip(*(layer.get_weights() for layer in layers)):
        _close(ours, theirs)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_integers_are_not_rounded(policy):
    """70,000 is infinity in float16, and 259 is 260 in bfloat16."""
    large = np.array([[257], [259], [260], [70000]], "int32")
    for values in (large[:3], large):
        layer = OURS(momentum=0.0, epsilon=0.0, dtype=policy)
        outputs = frameworks.array(layer(values, training=True))
        right = (values - values.mean()) / values.std()
        np.testing.assert_allclose(outputs, right, 1e-2, 1e-2)
        np.testing.assert_allclose(layer.moving_mean, [values.mean()], 1e-6)
        np.testing.assert_allclose(layer.moving_variance, [values.var()], 1e-5)


# Trainable, losses, constraints.


def test_not_trainable_means_inference():
    layers = _twins((8, 3), trainable=False)
    inputs = frameworks.tensor(np.random.default_rng(3).normal(size=(8, 3)))
    before = layers[1].get_weights()
    outputs = [layer(inputs, training=True) for layer in layers]
    _close(*(frameworks.array(v) for v in outputs))
    for now, then in zip(layers[1].get_weights(), before):
        np.testing.assert_array_equal(now, then)
    assert not layers[1].trainable_variables
    for layer in layers:
        layer.trainable = True
    _same_step(*layers, inputs, np.ones((8, 3)))


def test_regularizers_add_their_losses():
    kwargs = {"beta_regularizer": "l2", "gamma_regularizer": "l1"}
    theirs, ours = _twins((8, 3), **kwargs)
    losses = [[frameworks.array(v) for v in x.losses] for x in (theirs, ours)]
    assert len(losses[1]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_an_axis_name_in_a_file_of_jax():
    config = OURS().get_config() | {"axis_name": ["devices", "hosts"]}
    layer = OURS.from_config(config)
    assert layer.axis_name == ("devices", "hosts")
    assert layer.get_config()["axis_name"] == ("devices", "hosts")
    if not frameworks.IS_JAX:
        with pytest.raises(ValueError, match="Leave it out"):
            OURS(axis_name="devices")


if frameworks.IS_TENSORFLOW:
    import tensorflow as tf
    from tensorflow.python.framework import kernels

    def test_a_gpu_can_hold_every_weight():
        """Of another dtype it would be the host's, and XLA would not find it.

        https://www.tensorflow.org/xla/known_issues
        """
        dtypes = {
            tf.as_dtype(number).name
            for kernel in kernels.get_registered_kernels_for_op(
                "VarHandleOp"
            ).kernel
            if kernel.device_type == "DEFAULT"
            for constraint in kernel.constraint
            for number in constraint.allowed_values.list.type
        }
        for momentum in (None, 0.9):
            layer = OURS(
                momentum=momentum,
                debias=momentum is not None,
                renorm=True,
                renorm_clipping=keras_bn.renorm_schedule(),
            )
            layer.build((8, 3))
            weights = {x.name: x.dtype for x in layer.weights}
            assert {"num_batches_tracked", "renorm_step"} < set(weights)
            assert set(weights.values()) <= dtypes

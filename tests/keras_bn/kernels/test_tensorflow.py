"""What only TensorFlow has: unknown shapes in graphs, XLA, SavedModel."""

import contextlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given

import keras_bn
from keras_bn import kernels
from keras_bn.kernels import reference
from keras_bn.kernels.tensorflow import views
from tests.keras_bn.cases import cases
from tests.keras_bn.kernels.test_kernels import check

EPSILON = 1e-3


def _fused_at_any_size():
    """Small inputs take plain ops instead of the fused one; not in here."""
    return mock.patch.object(views, "_SMALL", -1)


@given(cases(dtypes=("float16", "bfloat16", "float32")))
def test_the_fused_op_over_generated_cases(case):
    with _fused_at_any_size():
        check(case)


def _on_a_gpu():
    """The roads that are taken where there is one, on the CPU."""
    return mock.patch.object(
        tf.config, "get_visible_devices", lambda *kind: ["a GPU"]
    )


@given(cases(dtypes=("float16", "bfloat16", "float32")))
def test_the_roads_on_a_gpu_over_generated_cases(case):
    with _on_a_gpu():
        check(case)


@pytest.mark.parametrize(
    ("shape", "axis", "seen"),
    [
        ((32, 56, 56, 256), 3, (32, 56 * 56, 1, 256)),
        ((32, 16, 8, 8), 1, (32, 64, 1, 16)),
        ((70_000, 16), 1, (70_000, 1, 1, 16)),
    ],
)
def test_what_cudnn_is_given(shape, axis, seen):
    """It refuses long batches: 880,801 in training, 65,535 in inference.

    As PyTorch says, which has another kernel for longer ones:
    aten/src/ATen/native/Normalization.cpp, `_select_batch_norm_backend`.
    """
    channels = shape[axis]

    def ops(unknown, function):
        known = tf.TensorSpec([None if unknown else shape[0], *shape[1:]])
        with _on_a_gpu():
            graph = tf.function(function).get_concrete_function(known).graph
        return [x for x in graph.get_operations() if "FusedBatchNorm" in x.type]

    ones = tf.ones([channels])
    settings = {"axis": axis, "epsilon": EPSILON}
    for unknown in (False, True):
        (op,) = ops(
            unknown,
            lambda x: kernels.normalize_batch(x, None, None, **settings),
        )[:1]
        found = op.inputs[0].shape.as_list()
        assert found == [None if unknown else seen[0], *seen[1:]]
        assert not ops(
            unknown,
            lambda x: kernels.normalize_with(x, *[ones] * 4, **settings),
        )


@pytest.mark.parametrize("unknown", [False, True])
def test_one_position_on_a_gpu(unknown):
    """cuDNN divides its variance by N - 1: NaN, tensorflow#34062."""
    op = tf.raw_ops.FusedBatchNormV3

    def cudnn(**given):
        results = op(**given)
        nan = tf.fill(tf.shape(results.batch_variance), float("nan"))
        return results._replace(batch_variance=nan)

    inputs = tf.constant([[1.0, -2.0, 5.0]])

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def in_graph(x):
        return kernels.normalize_batch(x, None, None, axis=1, epsilon=EPSILON)

    def eager(x):
        return kernels.normalize_batch(x, None, None, axis=1, epsilon=EPSILON)

    with _on_a_gpu(), mock.patch.object(tf.raw_ops, "FusedBatchNormV3", cudnn):
        outputs, mean, variance, _ = (in_graph if unknown else eager)(inputs)
    np.testing.assert_array_equal(mean, inputs[0])
    np.testing.assert_array_equal(variance, [0.0] * 3)
    np.testing.assert_array_equal(outputs, [[0.0] * 3])


@given(cases(dtypes=("float16", "bfloat16", "float32"), masks=(None,)))
def test_the_fused_op_in_a_graph_of_known_shape(case):
    data = case.data()
    inputs = tf.constant(data[0], case.dtype)

    @tf.function
    def step():
        results = kernels.normalize_batch(
            inputs, None, None, axis=case.axis, epsilon=case.epsilon
        )
        again = kernels.batch_moments(inputs, axis=case.axis)
        return *results, *again

    with _fused_at_any_size():
        outputs, mean, variance, _, again_mean, again_variance, _ = step()
    expected = reference.normalize_batch(
        data[0], None, None, axis=case.axis, epsilon=case.epsilon
    )
    unit = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-4}[case.dtype]
    scale = 1 + np.abs(data[0]).max(initial=0.0)
    np.testing.assert_allclose(
        tf.cast(outputs, tf.float64), expected[0], unit, unit
    )
    for value in (mean, again_mean):
        np.testing.assert_allclose(value, expected[1], 1e-5, 1e-6 * scale)
    for value in (variance, again_variance):
        np.testing.assert_allclose(
            value, expected[2], 1e-4, (1e-5 * scale) ** 2
        )


def _mask(generator, shape, axis):
    mask = [1 if i == axis else n for i, n in enumerate(shape)]
    return generator.random(mask) < 0.6


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "known, axis",
    [((None, None, None, 3), 3), ((None, 3, None, None), 1)]
    + [((None, 4), 1), ((None, 5, 3), 2), ((None, None, 3), 2)],
)
@pytest.mark.parametrize("far", [0.0, 100.0])
@pytest.mark.parametrize("fused", [False, True])
def test_one_graph_for_all_shapes(known, axis, masked, dtype, far, fused):
    """The empty batch and the batch of one among them."""
    with _fused_at_any_size() if fused else contextlib.nullcontext():
        check_one_graph(known, axis, masked, dtype, far)


def check_one_graph(known, axis, masked, dtype, far):
    channels = known[axis]

    @tf.function(
        input_signature=[
            tf.TensorSpec(known, dtype),
            tf.TensorSpec(known, dtype),
            tf.TensorSpec(
                [1 if i == axis else n for i, n in enumerate(known)], tf.bool
            ),
        ]
    )
    def step(inputs, gradient, mask):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs, *moments = kernels.normalize_batch(
                inputs,
                None,
                None,
                axis=axis,
                epsilon=EPSILON,
                mask=mask if masked else None,
            )
        return outputs, *moments, tape.gradient(outputs, inputs, gradient)

    generator = np.random.default_rng(0)
    for sizes in [(4, 2, 3), (1, 1, 1), (2, 7, 1), (0, 2, 3)]:
        sizes = list(sizes[: len(known) - 1])
        shape = [n or sizes.pop(0) for n in known]
        inputs = tf.constant(generator.normal(far, 2.0, shape), dtype)
        gradient = tf.constant(generator.normal(size=shape), dtype)
        mask = _mask(generator, shape, axis)
        outputs, mean, variance, count, of_inputs = step(inputs, gradient, mask)
        inputs = tf.cast(inputs, tf.float64).numpy()
        settings = {"axis": axis, "mask": mask if masked else None}
        expected = reference.normalize_batch(
            inputs, None, None, epsilon=EPSILON, **settings
        )
        assert outputs.shape == inputs.shape
        unit = 2.0**-7 if dtype == "bfloat16" else 2e-5
        np.testing.assert_allclose(
            tf.cast(outputs, tf.float64), expected[0], unit, unit + 3e-6 * far
        )
        np.testing.assert_allclose(mean, expected[1], 1e-5, 1e-5)
        np.testing.assert_allclose(variance, expected[2], 1e-4, 1e-7)
        np.testing.assert_array_equal(
            np.broadcast_to(count, [channels]), expected[3]
        )
        of_expected, *_ = reference.normalize_batch_gradient(
            tf.cast(gradient, tf.float64).numpy(),
            inputs,
            None,
            epsilon=EPSILON,
            **settings,
        )
        scale = np.abs(1 / np.sqrt(expected[2] + EPSILON)).max()
        np.testing.assert_allclose(
            tf.cast(of_inputs, tf.float64),
            of_expected,
            unit,
            4 * scale * (unit + 1e-6 * far),
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_under_xla(masked, far, dtype):
    generator = np.random.default_rng(0)
    shape = (16, 8, 8, 3)
    inputs = tf.constant(generator.normal(far, 1.0, shape), dtype)
    mask = _mask(generator, shape, 3) if masked else None
    step = tf.function(
        lambda x: kernels.normalize_batch(
            x, None, None, axis=3, epsilon=EPSILON, mask=mask
        ),
        jit_compile=True,
    )
    outputs, mean, variance, _ = step(inputs)
    expected = reference.normalize_batch(
        tf.cast(inputs, tf.float64).numpy(),
        None,
        None,
        axis=3,
        epsilon=EPSILON,
        mask=mask,
    )
    np.testing.assert_allclose(mean, expected[1], 4e-7, 1e-6)
    np.testing.assert_allclose(variance, expected[2], 1e-4)
    unit = 2.0**-7 if dtype == "bfloat16" else 1e-4
    shift = 4e-7 * far / np.sqrt(expected[2] + EPSILON).min()
    np.testing.assert_allclose(
        tf.cast(outputs, tf.float64), expected[0], unit, unit + shift
    )


def test_fewer_samples_than_a_ghost_batch_under_xla():
    """12 samples in batches of 8, which are the ghost batches."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(2.0, 3.0, (12, 3, 4)).astype("float32")
    layer = keras_bn.BatchNormalization(momentum=0.5, virtual_batch_size=8)
    model = keras.Sequential([keras.Input((3, 4)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=True)
    model.fit(inputs, inputs, batch_size=8, shuffle=False, verbose=0)
    first, last = (x.reshape(-1, 4) for x in (inputs[:8], inputs[8:]))
    mean = first.mean(0) / 4.0 + last.mean(0) / 2.0
    variance = 0.25 + first.var(0) / 4.0 + last.var(0) / 2.0
    np.testing.assert_allclose(layer.moving_mean, mean, 1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, 1e-5)


@pytest.mark.parametrize("known", [(None,) * 3, (16, None, 11), (16, 7, 11)])
def test_a_mask_of_channels_in_a_graph(known):
    generator = np.random.default_rng(0)
    inputs = generator.normal(5.0, 2.0, (16, 7, 11, 18)).astype("float32")
    mask = generator.random((1, 1, 11, 18)) < 0.5
    step = tf.function(
        lambda *batch: kernels.batch_moments(batch[0], axis=3, mask=batch[1]),
        input_signature=[
            tf.TensorSpec([*known, 18]),
            tf.TensorSpec([1, 1, known[2], 18], tf.bool),
        ],
    )
    found = step(inputs, mask)
    expected = reference.batch_moments(inputs, axis=3, mask=mask)
    for one, right in zip(found, expected):
        np.testing.assert_allclose(one, right, 1e-5)


def test_export_to_saved_model(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = keras_bn.BatchNormalization(renorm=True)(inputs)
    model = keras.Model(inputs, keras_bn.BatchNormalization(axis=-1)(x))
    values = np.random.default_rng(0).normal(2, 3, (8, 4, 5, 3))
    values = values.astype("float32")
    model(values, training=True)
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(
        loaded.serve(values), model(values), rtol=1e-5, atol=1e-6
    )


def test_synchronized_without_replicas_changes_nothing():
    values = np.random.default_rng(0).normal(2, 3, (8, 4, 5, 3))
    layers = [
        layer(synchronized=synchronized, momentum=0.5)
        for layer in (
            keras.layers.BatchNormalization,
            keras_bn.BatchNormalization,
        )
        for synchronized in (False, True)
    ]
    results = [layer(values, training=True) for layer in layers]
    for layer, outputs in zip(layers, results):
        np.testing.assert_allclose(outputs, results[0], 1e-4, 1e-5)
        for a, b in zip(layer.get_weights(), layers[0].get_weights()):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("far", [0.0, 3.0, 25.0])
def test_variances_under_xla(far, dtype):
    """XLA takes E[x^2] - E[x]^2 for the fused op's variance."""
    values = np.random.default_rng(0).normal(far, 1.0, (131072, 4))
    inputs = tf.constant(values, dtype)
    moments = tf.function(
        lambda x: kernels.normalize_batch(
            x, None, None, axis=1, epsilon=EPSILON
        )[1:3],
        jit_compile=True,
    )
    mean, variance = moments(inputs)
    values = tf.cast(inputs, tf.float64).numpy()
    np.testing.assert_allclose(mean, values.mean(0), 1e-6, 1e-6)
    np.testing.assert_allclose(variance, values.var(0), 2e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [None, False, True])
@pytest.mark.parametrize("shape", [(40, 6), (64, 32, 32, 3), (40, 32, 32, 4)])
def test_forward_mode(shape, compiled, masked):
    generator = np.random.default_rng(0)
    inputs, tangent = (
        tf.constant(generator.normal(2.0, 1.0, shape), "float32")
        for _ in range(2)
    )
    axis = len(shape) - 1
    mask = _mask(generator, shape, axis) if masked else None

    def outputs(inputs):
        return kernels.normalize_batch(
            inputs, None, None, axis=axis, epsilon=EPSILON, mask=mask
        )[0]

    def both(inputs, tangent):
        with tf.autodiff.ForwardAccumulator(inputs, tangent) as forward:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = outputs(inputs)
            gradient = tape.gradient(y, inputs, tf.sin(inputs))
        return forward.jvp(y), gradient

    if compiled is not None:
        both = tf.function(both, jit_compile=compiled)
    found, gradient = both(inputs, tangent)
    far = inputs.numpy().astype("float64")
    settings = {"axis": axis, "epsilon": EPSILON, "mask": mask}
    step = 1e-6 * tangent.numpy()
    above, below = (
        reference.normalize_batch(x, None, None, **settings)[0]
        for x in (far + step, far - step)
    )
    np.testing.assert_allclose(found, (above - below) / 2e-6, 1e-4, 1e-4)
    expected, *_ = reference.normalize_batch_gradient(
        np.sin(far), far, None, **settings
    )
    np.testing.assert_allclose(gradient, expected, 1e-4, 1e-4)


def test_channels_that_the_graph_does_not_know():
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer.build((None, 5))
    values = np.random.default_rng(0).normal(2.0, 3.0, (8, 5)).astype("float32")
    step = tf.function(
        lambda x: layer(x, training=True),
        input_signature=[tf.TensorSpec([None, None])],
    )
    np.testing.assert_allclose(
        step(values), layer(values, training=True), 1e-5, 1e-5
    )
    np.testing.assert_allclose(layer.moving_mean, values.mean(0), 1e-5)


def test_no_channels():
    step = tf.function(
        lambda x: kernels.normalize_batch(
            x, None, None, axis=1, epsilon=EPSILON
        )[0],
        input_signature=[tf.TensorSpec([None, 0])],
    )
    assert step(tf.ones([4, 0])).shape == (4, 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"renorm": True}, {"virtual_batch_size": 3}, {"dtype": "float64"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(7, 6, 5), (16, 64, 64, 4)])
def test_an_optimizer_in_the_graph_waits_for_the_outputs(
    shape, arguments, masked
):
    """TensorFlow may reorder a graph: gamma's gradient does not need gamma."""
    generator = np.random.default_rng(0)
    bn = keras_bn.BatchNormalization(**arguments)
    bn.build(shape)
    inputs, output_gradient = (
        tf.constant(generator.normal(size=shape), bn.compute_dtype)
        for _ in range(2)
    )
    mask = tf.constant(generator.random(shape[:-1]) < 0.6) if masked else None

    def outputs(inputs):
        return bn(inputs, training=True, mask=mask)

    @tf.function
    def step(inputs, output_gradient):
        weights = [bn.gamma.value, bn.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            result = outputs(inputs)
        of_inputs, *gradients = tape.gradient(
            result, [inputs, *weights], output_gradient
        )
        for weight, gradient in zip(weights, gradients):
            weight.assign_sub(gradient)
        return result, of_inputs

    before = bn.get_weights()
    expected = outputs(inputs)
    for _ in range(3):
        bn.set_weights(before)
        found, _ = step(inputs, output_gradient)
        np.testing.assert_allclose(found, expected, 1e-3, 1e-3)

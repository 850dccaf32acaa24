"""What holds for the JAX kernels alone: what they save, transform, shard."""

import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import keras  # noqa: E402

if keras.backend.backend() != "jax":
    pytest.skip("the JAX backend only", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402

import keras_bn  # noqa: E402
from keras_bn.kernels import jax as kernels  # noqa: E402
from keras_bn.kernels import reference  # noqa: E402
from keras_bn.kernels.jax.replicas import Replicas  # noqa: E402

EPSILON = 1e-3


def _normalize(inputs, gamma, beta, mask=None, axis=-1):
    return kernels.normalize_batch(
        inputs,
        gamma,
        beta,
        axis=axis % inputs.ndim,
        epsilon=EPSILON,
        mask=mask,
    )[0]


def _random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_backward_pass_keeps_inputs_mask_and_vectors_only(dtype, masked):
    inputs = jnp.asarray(_random((16, 8, 8, 32)), dtype)
    mask = jnp.ones((16, 8, 1, 1), bool) if masked else None
    vector = jnp.ones(32)
    _, pullback = jax.vjp(
        lambda x, g, b: _normalize(x, g, b, mask), inputs, vector, vector
    )
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    allowed = inputs.nbytes + (mask.nbytes if masked else 0)
    vectors = 8 * vector.nbytes
    assert allowed <= saved <= allowed + vectors


def test_no_float32_copy_of_bfloat16_inputs():
    inputs = jnp.zeros((64, 16, 16, 32), jnp.bfloat16)
    vector = jnp.ones(32)

    def forward_and_backward(x, g, b, dy):
        outputs, pullback = jax.vjp(_normalize, x, g, b)
        return outputs, pullback(dy)

    compiled = (
        jax.jit(forward_and_backward)
        .lower(inputs, vector, vector, inputs)
        .compile()
    )
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2 * inputs.nbytes


@pytest.mark.parametrize("masked", [False, True])
def test_second_and_third_derivatives(masked):
    shape = (6, 5, 3)
    inputs, weights = _random(shape), _random(shape, 1)
    mask = _random(shape, 2) > -0.5 if masked else None
    gamma, beta = _random(3, 3), _random(3, 4)

    def plain(x, g, b):
        counts = jnp.ones(shape, bool) if mask is None else mask
        mean = jnp.mean(x, (0, 1), where=counts)
        variance = jnp.var(x, (0, 1), where=counts)
        return (x - mean) / jnp.sqrt(variance + EPSILON) * g + b

    def derivative(function, order):
        value = lambda *a: jnp.sum(jnp.sin(function(*a)) * weights)  # noqa: E731
        for _ in range(order - 1):
            value = _sum_of_gradients(value)
        return jax.jit(jax.grad(value, (0, 1, 2)))(inputs, gamma, beta)

    def ours(x, g, b):
        return _normalize(x, g, b, mask)

    for order in (2, 3):
        for ours_, plain_ in zip(
            derivative(ours, order), derivative(plain, order)
        ):
            scale = np.abs(plain_).max()
            np.testing.assert_allclose(ours_, plain_, 1e-3, 1e-4 * scale)


def _sum_of_gradients(function):
    return lambda *a: sum(
        jnp.sum(jnp.cos(g) * g) for g in jax.grad(function, (0, 1, 2))(*a)
    )


@pytest.mark.parametrize(
    ("dtype", "masked"), [("float32", False), ("float64", True)]
)
def test_forward_mode(dtype, masked):
    """As Keras's layer; in float64, where that is off by 3e-7, as a formula."""
    with jax.enable_x64(dtype == "float64"):
        tolerance = 2e-4 if dtype == "float32" else 1e-11
        inputs, direction = (
            jnp.asarray(_random((6, 5, 3), seed), dtype) for seed in (0, 1)
        )
        mask = jnp.asarray(_random((6, 5), 2) > -0.5) if masked else None
        vectors = [jnp.asarray(_random(3, seed), dtype) for seed in (3, 4)]

        def outputs_of(layer):
            layer.build(inputs.shape)
            state = [v.value for v in layer.non_trainable_variables]

            def outputs(inputs, *parameters):
                return layer.stateless_call(
                    list(parameters), state, inputs, training=True, mask=mask
                )

            return outputs

        def formula(inputs, gamma, beta):
            kept = jnp.ones((6, 5)) > 0 if mask is None else mask
            kept = kept[..., None]
            mean = jnp.mean(inputs, (0, 1), where=kept)
            variance = jnp.var(inputs, (0, 1), where=kept)
            outputs = (inputs - mean) / jnp.sqrt(variance + EPSILON)
            state = mean * 0.01, variance * 0.01 + 0.99
            return outputs * gamma + beta, list(state)

        ours = outputs_of(
            keras_bn.BatchNormalization(epsilon=EPSILON, dtype=dtype)
        )
        if dtype == "float32":
            other = outputs_of(keras.layers.BatchNormalization(epsilon=EPSILON))
        else:
            other = formula
        arguments = inputs, *vectors
        changes = direction, *reversed(vectors)

        def derivatives(outputs):
            def loss(inputs):
                return jnp.sum(outputs(inputs, *vectors)[0] * direction)

            yield jax.jvp(outputs, arguments, changes)[1]
            yield jax.linearize(outputs, *arguments)[1](*changes)
            yield jax.jacfwd(outputs, (0, 1, 2))(*arguments)
            yield jax.jit(jax.hessian(loss))(inputs)
            yield jax.jacrev(jax.grad(loss))(inputs)
            yield jax.grad(
                lambda x: jnp.sum(jax.jvp(loss, (x,), (direction,))[1] ** 2)
            )(inputs)

        for right, found in zip(derivatives(other), derivatives(ours)):
            for x, y in zip(jax.tree.leaves(right), jax.tree.leaves(found)):
                scale = np.abs(x).max()
                np.testing.assert_allclose(y, x, atol=tolerance * scale)


def test_forward_and_reverse_mode_agree():
    inputs = jnp.asarray(_random((8, 3)))

    def outputs(inputs):
        return jax.vmap(lambda x: _normalize(x, None, None))(
            jnp.stack([inputs, jnp.sin(inputs)])
        )

    forward, reverse = jax.jacfwd(outputs)(inputs), jax.jacrev(outputs)(inputs)
    np.testing.assert_allclose(forward, reverse, atol=1e-5)


@pytest.mark.parametrize("checked", [False, True])
def test_forward_mode_over_replicas(checked):
    """Forward, one more collective; in both modes, as for a whole batch."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    split, whole = (
        jax.sharding.PartitionSpec(*names) for names in (["batch"], [])
    )
    inputs, direction = _random((64, 3)), _random((64, 3), 1)
    gamma, beta = jnp.asarray(_random(3, 2)), jnp.asarray(_random(3, 3))

    def outputs(inputs, gamma, beta):
        return kernels.normalize_batch(
            inputs,
            gamma,
            beta,
            axis=1,
            epsilon=EPSILON,
            replicas=Replicas(("batch",)),
        )[0]

    sharded = jax.shard_map(
        outputs,
        mesh=mesh,
        in_specs=(split, whole, whole),
        out_specs=split,
        check_vma=checked,
    )
    arguments, changes = (inputs, gamma, beta), (direction, beta, gamma)

    @jax.jit
    def found(arguments, changes):
        return jax.jvp(sharded, arguments, changes)

    text = found.lower(arguments, changes).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2

    def plain(inputs, gamma, beta):
        mean, variance = inputs.mean(0), inputs.var(0)
        return (inputs - mean) / jnp.sqrt(variance + EPSILON) * gamma + beta

    expected = jax.jvp(plain, arguments, changes)
    for x, y in zip(found(arguments, changes), expected):
        np.testing.assert_allclose(x, y, 1e-4, 1e-4)


def test_vmap_and_scan():
    inputs = _random((3, 40, 4)) + 100
    expected = np.stack(
        [
            reference.normalize_batch(x, None, None, axis=1, epsilon=EPSILON)[0]
            for x in inputs
        ]
    )
    mapped = jax.vmap(lambda x: _normalize(x, None, None))(inputs)
    _, scanned = jax.lax.scan(
        lambda carry, x: (carry, _normalize(x, None, None)), 0, inputs
    )
    np.testing.assert_allclose(mapped, expected, atol=1e-4)
    np.testing.assert_allclose(scanned, expected, atol=1e-4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.__setitem__(slice(None, 128), -1e6),
        lambda x: x.__setitem__(128, 1e10),
        lambda x: x.__setitem__(slice(128, None, 256), 0),
        lambda x: x.__setitem__(slice(None), 1e4 / 3),
    ],
    ids=["outliers first", "sampled outlier", "sampled zeros", "constant"],
)
def test_moments_where_the_sampled_shift_misleads(spoil):
    inputs = _random((4096, 8)) + np.float32(1e4)
    spoil(inputs)
    mean, variance, _ = jax.jit(lambda x: kernels.batch_moments(x, axis=1))(
        inputs
    )
    expected_mean, expected_variance, _ = reference.batch_moments(
        inputs, axis=1
    )
    np.testing.assert_allclose(mean, expected_mean, 1e-6)
    np.testing.assert_allclose(variance, expected_variance, 1e-5)


@pytest.mark.parametrize("shape", [(64, 8, 8, 16), (64, 48)])
def test_batch_sharding_reduces_vectors_and_gathers_nothing(shape):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("batch",))
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec("batch")
    )
    inputs = jax.device_put(_random(shape), sharding)
    vector = jnp.ones(shape[-1])

    @jax.jit
    def forward_and_backward(x, g, b, dy):
        outputs, pullback = jax.vjp(_normalize, x, g, b)
        return outputs, pullback(dy)

    arguments = inputs, vector, vector, inputs
    text = forward_and_backward.lower(*arguments).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    outputs, gradients = forward_and_backward(*arguments)
    assert outputs.sharding == gradients[0].sharding == sharding
    expected = reference.normalize_batch(
        inputs, None, None, axis=len(shape) - 1, epsilon=EPSILON
    )[0]
    np.testing.assert_allclose(outputs, expected + 1, atol=1e-4)


def test_gradients_inside_shard_map():
    """Each device normalizes its shard; parameters are shared."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    split, whole = (
        jax.sharding.PartitionSpec(*names) for names in (["batch"], [])
    )
    inputs, direction = _random((64, 3)), _random((64, 3), 1)
    gamma, beta = jnp.full(3, 2.0), jnp.ones(3)

    def loss(gamma, beta, inputs, direction):
        outputs = _normalize(inputs, gamma, beta)
        return jax.lax.psum(jnp.sum(outputs * direction), "batch")

    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=whole
    )
    found = jax.grad(sharded, (0, 1, 2))(gamma, beta, inputs, direction)
    halves = [
        reference.normalize_batch_gradient(
            direction[half], inputs[half], gamma, axis=1, epsilon=EPSILON
        )
        for half in (slice(32), slice(32, None))
    ]
    of_inputs, of_gamma, of_beta = zip(*halves)
    np.testing.assert_allclose(found[0], sum(of_gamma), 1e-4, 1e-4)
    np.testing.assert_allclose(found[1], sum(of_beta), 1e-4, 1e-4)
    np.testing.assert_allclose(found[2], np.concatenate(of_inputs), 1e-4, 1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_export_with_an_unknown_batch(far, masked):
    def step(inputs, mask):
        def outputs(inputs):
            return _normalize(inputs, None, None, mask if masked else None)

        moments = kernels.batch_moments(
            inputs, axis=2, mask=mask if masked else None
        )
        _, pullback = jax.vjp(outputs, inputs)
        return *pullback(jnp.sin(inputs)), *moments

    size, *_ = jax.export.symbolic_shape("batch,4,5")
    exported = jax.export.export(jax.jit(step))(
        jax.ShapeDtypeStruct((size, 4, 5), "float32"),
        jax.ShapeDtypeStruct((size, 4, 1), "bool"),
    )
    for batch in (1, 300):
        inputs = _random((batch, 4, 5)) + np.float32(far)
        mask = np.random.default_rng(0).random((batch, 4, 1)) < 0.7
        settings = {"axis": 2, "mask": mask if masked else None}
        found, mean, variance, count = exported.call(inputs, mask)
        expected = reference.batch_moments(inputs, **settings)
        np.testing.assert_allclose(mean, expected[0], 4e-7, 1e-6)
        np.testing.assert_allclose(variance, expected[1], 1e-4)
        np.testing.assert_array_equal(np.broadcast_to(count, [5]), expected[2])
        right, *_ = reference.normalize_batch_gradient(
            np.sin(inputs), inputs, None, epsilon=EPSILON, **settings
        )
        np.testing.assert_allclose(found, right, 1e-3, 1e-3 + 1e-6 * far)


def test_moments_returned_have_gradients():
    """Users of `stateless_call` may differentiate what they get back."""
    inputs = jnp.asarray(_random((64, 3)))

    def sums(inputs):
        _, mean, variance, _ = kernels.normalize_batch(
            inputs, None, None, axis=1, epsilon=EPSILON
        )
        return jnp.sum(mean**2 + variance)

    found = jax.grad(sums)(inputs)
    right = jax.grad(lambda x: jnp.sum(x.mean(0) ** 2 + x.var(0)))(inputs)
    np.testing.assert_allclose(found, right, 1e-5, 1e-7)

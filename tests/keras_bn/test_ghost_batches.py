"""`virtual_batch_size`: parts of the batch, each normalized on its own.

The measure is the plain layer, called on each part in turn.
"""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn import kernels
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KINDS = [
    {},
    {"momentum": None},
    {"momentum": 0.8, "debias": True},
    {"momentum": 0.5, "unbiased_variance": True},
]


def _values(shape, seed=0, far=0.0):
    generator = np.random.default_rng(seed)
    # Parts that differ: their moments must not be mixed up.
    drift = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (generator.normal(far, 2.0, shape) + drift).astype("float32")


def check(shape, size, mask=None, axis=-1, dtype="float32", far=0.0, **kwargs):
    """Holds a training step against the plain layer on each part."""
    inputs, output_gradient = _values(shape, 0, far), _values(shape, 1)
    ghost = OURS(axis=axis, virtual_batch_size=size, dtype=dtype, **kwargs)
    plain = OURS(axis=axis, dtype=dtype, **kwargs)
    for layer in (ghost, plain):
        layer.build(shape)
        layer.gamma.assign(_values(layer.gamma.shape, 2))
        layer.beta.assign(_values(layer.beta.shape, 3))

    def step(layer, rows):
        masked = {}
        if mask is not None:
            part = mask[rows] if len(mask) > 1 else mask
            masked["mask"] = frameworks.tensor(part, "bool")
        compute = layer.compute_dtype
        return frameworks.training_step(
            layer,
            frameworks.tensor(inputs[rows], compute),
            output_gradient[rows],
            **masked,
        )

    found = step(ghost, slice(None))
    parts = [
        step(plain, slice(start, start + size))
        for start in range(0, shape[0], size)
    ]
    unit = 2e-2 if dtype == "mixed_bfloat16" else 1e-4
    scale = 1 + 1e-6 * far / unit

    def close(ours, right):
        size = max(1.0, np.abs(right).max(initial=0.0))
        np.testing.assert_allclose(ours, right, unit, unit * size * scale)

    close(found.outputs, np.concatenate([p.outputs for p in parts]))
    close(
        found.input_gradient, np.concatenate([p.input_gradient for p in parts])
    )
    for name, gradient in found.weight_gradients.items():
        close(gradient, sum(p.weight_gradients[name] for p in parts))
    for name, statistic in found.statistics.items():
        np.testing.assert_allclose(
            statistic, parts[-1].statistics[name], 1e-5, 1e-6, err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_as_the_plain_layer_on_each_part(size, kind):
    """Sizes that divide the batch of 8, that do not, and that exceed it."""
    check((8, 5, 3), size, **kind)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_many_parts(momentum):
    check((41, 5, 3), 2, momentum=momentum)


@pytest.mark.parametrize("axis", [1, (1, 2), (1, 3)], ids=str)
def test_channel_axes(axis):
    check((7, 4, 5, 3), 3, axis=axis)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [8, 1])
def test_under_a_mask(rows, kind):
    """For each sample, one part wholly masked, or for all samples alike."""
    mask = np.random.default_rng(0).random((rows, 5, 1)) < 0.6
    if rows > 1:
        mask[3:6] = False
    check((8, 5, 3), 3, mask=mask, **kind)


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_sizes_that_take_the_fast_kernels(far):
    check((24, 16, 16, 32), 16, far=far)


def test_small_parts_with_a_large_mean():
    check((96, 20), 32, far=1e4)


def test_bfloat16():
    check((8, 16, 16, 8), 3, dtype="mixed_bfloat16")


def test_an_empty_batch():
    layer = OURS(virtual_batch_size=4, momentum=None)
    layer.build((None, 3))
    before = layer.get_weights()
    inputs = frameworks.tensor(np.zeros((0, 3)))
    step = frameworks.training_step(layer, inputs)
    assert step.outputs.shape == (0, 3)
    for ours, right in zip(layer.get_weights(), before):
        np.testing.assert_array_equal(ours, right)


@pytest.mark.parametrize("masked", [False, True])
def test_fit_with_a_smaller_last_batch(masked, tmp_path):
    """17 samples in batches of 8 and ghost batches of 3; saved, loaded."""
    values = _values((17, 4, 3))
    mask = np.random.default_rng(0).random((17, 4)) < 0.7
    values[~mask] = 0.0

    def model(layer):
        inputs = keras.Input((4, 3))
        x = keras.layers.Masking()(inputs) if masked else inputs
        model = keras.Model(inputs, layer(x))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        return model

    ghost = model(OURS(virtual_batch_size=3))
    ghost.fit(values, values, batch_size=8, shuffle=False, verbose=0)
    plain = model(OURS())
    for start, stop in [(0, 3), (3, 6), (6, 8), (8, 11), (11, 14), (14, 16)]:
        part = values[start:stop]
        plain.train_on_batch(part, part)
    plain.train_on_batch(values[16:], values[16:])
    for ours, right in zip(ghost.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, right, 1e-5, 1e-6)
    np.testing.assert_allclose(
        ghost.predict(values, verbose=0),
        plain.predict(values, verbose=0),
        1e-4,
        1e-4,
    )
    ghost.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].virtual_batch_size == 3


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "8"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError) as error:
        OURS(virtual_batch_size=size)
    assert f"virtual_batch_size={size!r}" in str(error.value)


def test_combinations_that_are_refused():
    with pytest.raises(ValueError, match="virtual_batch_size=8, renorm=True"):
        OURS(virtual_batch_size=8, renorm=True)
    with pytest.raises(ValueError, match="axis 0 is that of samples"):
        OURS(virtual_batch_size=8, axis=0).build((4, 3))


@pytest.mark.parametrize("shape, size", [((6, 4, 3), 4), ((9, 16, 64), 4)])
def test_second_derivatives(shape, size):
    """Against those of the kernel for a whole batch, on each part."""
    inputs, output_gradient, direction = (_values(shape, i) for i in range(3))
    vectors = [
        np.random.default_rng(i).uniform(0.5, 2.0, shape[-1]) for i in range(2)
    ]
    settings = {"axis": len(shape) - 1, "epsilon": 1e-3}

    def second(kernel, rows, **more):
        def outputs(inputs, gamma):
            return kernel(inputs, gamma, None, **settings, **more)

        tensors, directions = (
            [frameworks.tensor(of_inputs[rows]), frameworks.tensor(vector)]
            for of_inputs, vector in zip((inputs, direction), vectors)
        )
        return frameworks.second_gradients(
            outputs,
            tensors,
            frameworks.tensor(output_gradient[rows]),
            directions,
        )

    found = second(kernels.normalize_ghost_batches, slice(None), size=size)
    parts = [
        second(kernels.normalize_batch, slice(start, start + size))
        for start in range(0, shape[0], size)
    ]
    of_inputs, of_gamma, of_gradient = zip(*parts)
    for ours, right in zip(
        found,
        [
            np.concatenate(of_inputs),
            sum(of_gamma),
            np.concatenate(of_gradient),
        ],
    ):
        scale = np.abs(right).max(initial=1e-3)
        np.testing.assert_allclose(ours, right, 1e-3, 1e-4 * scale)

"""Statistics for every index of several axes together."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.kernels import reference
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
SHAPE = (6, 4, 5, 3)
AXES = [(1, 2), (2, 3), (1, 3), (-1, 1), (0, 2), (1, 2, 3)]


def _inputs(shape=SHAPE, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(2.0, 3.0, shape).astype("float32")


class Merged:
    """NumPy arrays with several axes put last and made one."""

    def __init__(self, axis, shape=SHAPE):
        self.axes = sorted(i % len(shape) for i in axis)
        others = [i for i in range(len(shape)) if i not in self.axes]
        self.order = others + self.axes
        self.weights_shape = [
            n if i in self.axes else 1 for i, n in enumerate(shape)
        ]

    def merge(self, array):
        moved = np.transpose(array, self.order)
        return moved.reshape(*moved.shape[: -len(self.axes)], -1)

    def split(self, merged, shape=SHAPE):
        moved = merged.reshape([shape[i] for i in self.order])
        return np.transpose(moved, np.argsort(self.order))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_training_and_inference(axis, masked):
    several = Merged(axis)
    inputs, output_gradient = _inputs(), _inputs(seed=1)
    mask = np.random.default_rng(2).random(SHAPE) < 0.7 if masked else None
    kwargs = {"mask": frameworks.tensor(mask, "bool")} if masked else {}
    layer = OURS(axis=axis, momentum=0.0)
    layer.build(SHAPE)
    assert all(list(w.shape) == several.weights_shape for w in layer.weights)
    gamma, beta = _inputs((2, *several.weights_shape), seed=3)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    step = frameworks.training_step(
        layer, frameworks.tensor(inputs), output_gradient, **kwargs
    )

    settings = {"axis": len(SHAPE) - len(axis), "epsilon": layer.epsilon}
    masks = {"mask": several.merge(mask) if masked else None}
    x, dy = several.merge(inputs), several.merge(output_gradient)
    vectors = gamma.reshape(-1), beta.reshape(-1)
    outputs, mean, variance, count = reference.normalize_batch(
        x, *vectors, **settings, **masks
    )
    # What the mask leaves nothing of keeps its initial value.
    moving_variance = np.where(count > 0, variance, 1.0)
    dx, of_gamma, of_beta = reference.normalize_batch_gradient(
        dy, x, vectors[0], **settings, **masks
    )
    shape = several.weights_shape
    for ours, right in (
        (step.outputs, several.split(outputs)),
        (step.input_gradient, several.split(dx)),
        (step.weight_gradients["gamma"], of_gamma.reshape(shape)),
        (step.weight_gradients["beta"], of_beta.reshape(shape)),
        (step.statistics["moving_mean"], mean.reshape(shape)),
        (step.statistics["moving_variance"], moving_variance.reshape(shape)),
    ):
        np.testing.assert_allclose(ours, right, 1e-4, 1e-4)

    inference = frameworks.array(layer(frameworks.tensor(inputs)))
    expected = reference.normalize_with(
        x, mean, moving_variance, *vectors, **settings
    )
    np.testing.assert_allclose(inference, several.split(expected), 1e-4, 1e-4)


@pytest.mark.parametrize(
    "mask_shape", [(6, 4, 5), (6, 5), (6, 1, 5, 1), (1, 4, 1, 3)], ids=str
)
def test_masks_of_fewer_axes(mask_shape):
    """Without the channel axes 1 and 3, or, as Keras reads it, the last."""
    mask = np.random.default_rng(2).random(mask_shape) < 0.7
    at_full_rank = {
        3: lambda m: m[..., None],
        2: lambda m: m[:, None, :, None],
        4: lambda m: m,
    }[mask.ndim](mask)
    several = Merged((1, 3))
    layer = OURS(axis=(1, 3), momentum=0.0)
    statistics = frameworks.training_step(
        layer,
        frameworks.tensor(_inputs()),
        mask=frameworks.tensor(mask, "bool"),
    ).statistics
    mean, variance, count = reference.batch_moments(
        several.merge(_inputs()),
        axis=2,
        mask=several.merge(np.broadcast_to(at_full_rank, SHAPE)),
    )
    found = statistics["moving_mean"].reshape(-1)
    np.testing.assert_allclose(found, mean, 1e-4, 1e-5)
    found = statistics["moving_variance"].reshape(-1)
    variance = np.where(count > 0, variance, 1.0)
    np.testing.assert_allclose(found, variance, 1e-4, 1e-5)


def test_one_axis_in_a_list_is_that_axis():
    layer = OURS(axis=[-1])
    layer.build(SHAPE)
    assert layer.axis == -1
    assert layer.moving_mean.shape == (3,)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"renorm": True}, {"momentum": None, "unbiased_variance": True}],
    ids=str,
)
def test_in_models_of_unknown_sizes(kwargs, tmp_path):
    """`fit`, with batches that are not known to the graph; saved and loaded."""
    inputs = keras.Input((4, None, 3))
    layer = OURS(axis=(1, 3), **kwargs)
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, 4, None, 3)
    model.compile("sgd", "mse")
    values = _inputs((10, 4, 5, 3))
    model.fit(values, values, batch_size=4, verbose=0)
    outputs = model.predict(values, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].get_config() == layer.get_config()
    np.testing.assert_array_equal(loaded.predict(values, verbose=0), outputs)
    mean, variance, gamma, beta = (
        frameworks.array(v).astype("float64")
        for v in (
            layer.moving_mean,
            layer.moving_variance,
            layer.gamma,
            layer.beta,
        )
    )
    expected = (values - mean) / np.sqrt(variance + layer.epsilon)
    np.testing.assert_allclose(outputs, expected * gamma + beta, 1e-4, 1e-4)

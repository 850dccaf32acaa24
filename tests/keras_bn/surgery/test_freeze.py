"""`freeze`, `thaw` and `reset_statistics` of whole models."""

import warnings

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization
INPUTS = np.random.default_rng(0).normal(3.0, 2.0, (8, 4, 3)).astype("float32")


class Block(keras.layers.Layer):
    """A layer that holds others, in a list and a dictionary."""

    def __init__(self, layer):
        super().__init__()
        self.several = [keras.layers.Dense(3), layer()]
        self.named = {"last": layer(renorm=True)}

    def call(self, inputs, training=None):
        for layer in self.several:
            inputs = layer(inputs)
        return self.named["last"](inputs, training=training)


def _model(layer):
    """Batch normalization at every depth: five layers of it."""
    innermost = keras.Sequential([keras.layers.Dense(3), layer()])
    inner = keras.Sequential([keras.Input((4, 3)), innermost])
    inputs = keras.Input((4, 3))
    x = layer()(inner(inputs))
    x = keras.layers.TimeDistributed(layer())(Block(layer)(x))
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def _compile(model):
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
    return model


def _changed(model, step):
    """The names of the normalizing weights that `step` changes."""
    before = [w.numpy() for w in model.weights]
    step()
    return {
        w.name
        for w, then in zip(model.weights, before)
        if not np.array_equal(w.numpy(), then)
    } & {"gamma", "beta", *_initial(1.0)}


def _initial(variance):
    return {
        "moving_mean": 0.0,
        "moving_variance": variance,
        "moving_stddev": variance**0.5,
        "renorm_mean": 0.0,
        "renorm_stddev": variance**0.5,
        "num_batches_tracked": 0,
        "renorm_step": 0,
    }


STATISTICS = {
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
}


def _fit(model):
    model.fit(INPUTS, 0.0 * INPUTS, batch_size=8, verbose=0)


def _silently(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return function(*args)


def test_fit_follows_without_another_compile():
    model = _compile(_model(OURS))
    model.predict(INPUTS, verbose=0)
    assert _changed(model, lambda: _fit(model)) == STATISTICS | {
        "gamma",
        "beta",
    }
    layers = _silently(keras_bn.freeze, model)
    assert len(layers) == 5
    assert {type(layer) for layer in layers} == {OURS}
    assert _changed(model, lambda: _fit(model)) == {"gamma", "beta"}
    # In training as in inference.
    outputs = [
        frameworks.array(model(INPUTS, training=training))
        for training in (True, False)
    ]
    np.testing.assert_allclose(*outputs, 1e-5, 1e-6)
    assert _silently(keras_bn.freeze, model) == layers
    assert _silently(keras_bn.thaw, model) == layers
    assert _changed(model, lambda: _fit(model)) == STATISTICS | {
        "gamma",
        "beta",
    }


def test_a_frozen_model_trains_as_keras_does_in_inference():
    """Steps of gradient descent through fixed statistics."""
    theirs, ours = (
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), layer()])
        for layer in (KERAS, OURS)
    )
    inputs = INPUTS[:, 0]
    statistics = [np.float32([1, 2, 3]), np.float32([4, 5, 6])]
    ours.layers[-1].set_weights([*ours.get_weights()[2:4], *statistics])
    theirs.set_weights(ours.get_weights())
    keras_bn.freeze(ours)
    inputs = frameworks.tensor(inputs)
    for _ in range(2):
        step = frameworks.training_step(theirs, inputs, training=False)
        found = frameworks.training_step(ours, inputs)
        np.testing.assert_allclose(found.outputs, step.outputs, 1e-5, 1e-5)
        for name, gradient in step.weight_gradients.items():
            np.testing.assert_allclose(
                found.weight_gradients[name], gradient, 1e-4, 1e-4
            )
            for model in (theirs, ours):
                (weight,) = [w for w in model.weights if w.name == name]
                weight.assign(weight.numpy() - 0.01 * gradient)
    np.testing.assert_allclose(ours.get_weights()[4:], statistics)


def test_built_in_layers_freeze_whole():
    model = _compile(_model(KERAS))
    # The optimizer has not begun: nothing to warn of.
    assert len(_silently(keras_bn.freeze, model)) == 5
    assert _changed(model, lambda: _fit(model)) == set()

    with pytest.warns(UserWarning, match=r"call `model.compile\(...\)` again"):
        keras_bn.thaw(model)
    # Nothing changes the second time.
    _silently(keras_bn.thaw, model)
    _compile(model)
    assert _changed(model, lambda: _fit(model)) > STATISTICS


def test_both_kinds_in_one_model():
    model = keras.Sequential([keras.Input((4, 3)), OURS(), KERAS()])
    ours, theirs = keras_bn.freeze(model)
    assert ours.use_moving_statistics and not ours.update_moving_statistics
    assert ours.trainable and not theirs.trainable
    keras_bn.thaw(model)
    assert ours.use_moving_statistics is None and ours.update_moving_statistics
    assert ours.trainable and theirs.trainable


class _FreezeLater(keras.callbacks.Callback):
    """Freezes in the middle of `fit`; notes the means after each epoch."""

    def __init__(self):
        super().__init__()
        self.means = []

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            keras_bn.freeze(self.model)

    def on_epoch_end(self, epoch, logs=None):
        if frameworks.IS_JAX:
            self.model.jax_state_sync()
        self.means.append(np.array(self.model.layers[2].moving_mean.numpy()))


def test_a_callback_freezes():
    model = _compile(_model(OURS))
    later = _FreezeLater()
    model.fit(INPUTS, INPUTS, epochs=3, verbose=0, callbacks=[later])
    first, second, third = later.means
    assert np.any(first != 0.0)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)


def test_a_part_of_a_compiled_model():
    """What holds the part is not in reach, so it is said when it is run."""
    inner = keras.Sequential([keras.Input((4, 3)), OURS()])
    model = keras.Sequential(
        [keras.Input((4, 3)), inner, keras.layers.Dense(3)]
    )
    _fit(_compile(model))
    _silently(keras_bn.freeze, inner)
    if not frameworks.IS_TORCH:
        said = "use_moving_statistics=True, update_moving_statistics=False was"
        with pytest.warns(UserWarning, match=said):
            _fit(model)
        _silently(keras_bn.freeze, model)
    assert _changed(model, lambda: _fit(model)) == {"gamma", "beta"}


def test_frozen_layers_are_saved_frozen(tmp_path):
    model = keras.Sequential([keras.Input((4, 3)), OURS()])
    keras_bn.freeze(model)
    model.save(tmp_path / "model.keras")
    (layer,) = keras_bn.thaw(keras.saving.load_model(tmp_path / "model.keras"))
    again = keras.saving.load_model(tmp_path / "model.keras").layers[-1]
    assert again.use_moving_statistics is True
    assert again.update_moving_statistics is False
    assert layer.use_moving_statistics is None


@pytest.mark.parametrize("layer", [OURS, KERAS])
def test_reset_statistics(layer):
    variance = keras.initializers.Constant(4.0)
    kwargs = {"renorm": True, "moving_variance_initializer": variance}
    if layer is OURS:
        kwargs["momentum"] = None
        kwargs["renorm_clipping"] = keras_bn.renorm_schedule()
    one = layer(**kwargs)
    model = keras.Sequential(
        [keras.Input((4, 3)), keras.layers.TimeDistributed(one)]
    )
    fresh = model.get_weights()
    model(INPUTS, training=True)
    one.gamma.assign([7.0] * 3)
    fresh[0] = one.gamma.numpy()
    assert not np.array_equal(one.moving_mean.numpy(), fresh[2])
    assert keras_bn.reset_statistics(model) == [one]
    for weight, initial in zip(one.weights, fresh, strict=True):
        np.testing.assert_array_equal(weight.numpy(), initial)
        if weight.name in _initial(4.0):
            np.testing.assert_array_equal(
                initial, np.full_like(initial, _initial(4.0)[weight.name])
            )


def test_random_initializers_draw_anew():
    layer = OURS(
        moving_mean_initializer=keras.initializers.RandomNormal(seed=3)
    )
    layer.build((2, 50))
    first = layer.moving_mean.numpy()
    layer.moving_mean.assign(first + 1.0)
    keras_bn.reset_statistics(layer)
    # The same seed: the same values.
    np.testing.assert_array_equal(layer.moving_mean.numpy(), first)


def test_layers_that_are_not_built():
    layer = OURS()
    for helper in (keras_bn.freeze, keras_bn.thaw, keras_bn.reset_statistics):
        assert helper(layer) == [layer]


@pytest.mark.parametrize(
    "helper", [keras_bn.freeze, keras_bn.thaw, keras_bn.reset_statistics]
)
def test_bad_input(helper):
    nothing = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    for given in (None, "model", np.ones((3, 3)), [OURS()], OURS, nothing):
        with pytest.raises(ValueError) as error:
            helper(given)
        message = str(error.value)
        assert message.startswith(f"`{helper.__name__}` ")
        assert "Received: model" in message
        assert "\n" not in message

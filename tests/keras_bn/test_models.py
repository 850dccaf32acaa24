"""The layer in models: built, trained, saved and moved as Keras's layer is."""

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization


def _cnn(layer):
    """The article's CNN; fewer units, for time."""
    layers = [keras.Input((16, 16, 3))]
    for filters in (32, 64):
        layers += [
            keras.layers.Conv2D(filters, 5, padding="same", activation="relu"),
            layer(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        layer(),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers)


def _images(count=320, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.uniform(0, 1, (count, 16, 16, 3)).astype("float32")
    labels = generator.integers(0, 10, count)
    return images + labels[:, None, None, None] / 10, labels


def _compile(model, rate=1e-5, **kwargs):
    # At larger rates this net is chaotic: Keras's layer, fed images changed
    # by one part in a million, is 2% off its own loss after ten steps at 1e-3
    # and can be at 1e-4.
    model.compile(
        optimizer=keras.optimizers.SGD(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model


def _pair(build=_cnn):
    theirs, ours = build(KERAS), build(OURS)
    ours.set_weights(theirs.get_weights())
    return theirs, ours


def _same_weights(theirs, ours, rtol=1e-4, atol=1e-5):
    for a, b in zip(theirs.weights, ours.weights, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose(
            frameworks.array(b), frameworks.array(a), rtol, atol, err_msg=a.path
        )


MODES = [{}, {"run_eagerly": True}, {"jit_compile": True}]
if not frameworks.IS_TENSORFLOW:
    # JAX compiles by default; PyTorch would need a C++ compiler to.
    MODES = MODES[:2]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ten_steps_of_fit_end_where_keras_ends(mode):
    """Same weights, same batches: same loss and moving statistics."""
    check_ten_steps(3e-5, 1e-4, **mode)


if frameworks.IS_TENSORFLOW:

    def test_ten_steps_of_fit_in_float64():
        """At a rate at which float32 could not be compared.

        On the other backends Keras's layer rounds float64 to float32.
        """
        keras.config.set_dtype_policy("float64")
        check_ten_steps(1e-7, 1e-6, rate=0.01)


def check_ten_steps(loss_error, weight_error, **mode):
    images, labels = _images()
    losses = []
    pair = _pair()
    for model in pair:
        history = _compile(model, **mode).fit(
            images, labels, batch_size=32, epochs=1, shuffle=False, verbose=0
        )
        losses.append(history.history["loss"][0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=loss_error)
    _same_weights(*pair, weight_error, weight_error / 10)
    for model in pair:
        losses.append(model.evaluate(images, labels, verbose=0))
    np.testing.assert_allclose(losses[3], losses[2], rtol=10 * loss_error)
    predictions = [m.predict(images[:40], verbose=0) for m in pair]
    np.testing.assert_allclose(
        *predictions[::-1], 10 * weight_error, 10 * weight_error
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_fit_in_mixed_precision(policy):
    """Losses that come down, and statistics of the data, in float32."""
    keras.config.set_dtype_policy(policy)
    images, labels = _images(128)
    model = _compile(_cnn(OURS), 0.01)
    history = model.fit(images, labels, batch_size=32, epochs=3, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < losses[0]
    for layer in model.layers:
        if isinstance(layer, OURS):
            assert layer.compute_dtype == policy.removeprefix("mixed_")
            assert layer.moving_mean.dtype == "float32"
            assert (frameworks.array(layer.moving_variance) > 0).all()


def test_train_on_batch():
    images, labels = _images(32)
    pair = _pair()
    losses = [
        [_compile(m).train_on_batch(images, labels) for _ in range(2)]
        for m in pair
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=3e-5)
    _same_weights(*pair)


def _hand_written_step(model, inputs, rate=1e-4):
    """One step of gradient descent on the mean square of the outputs."""
    if frameworks.IS_TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = keras.ops.mean(model(inputs, training=True) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
    elif frameworks.IS_JAX:
        import jax

        def run(weights, state):
            outputs, state = model.stateless_call(
                weights, state, inputs, training=True
            )
            return keras.ops.mean(outputs**2), state

        weights = [v.value for v in model.trainable_variables]
        state = [v.value for v in model.non_trainable_variables]
        (loss, state), gradients = jax.jit(
            jax.value_and_grad(run, has_aux=True)
        )(weights, state)
        for variable, value in zip(model.non_trainable_variables, state):
            variable.assign(value)
    else:
        loss = keras.ops.mean(model(inputs, training=True) ** 2)
        model.zero_grad()
        loss.backward()
        gradients = [v.value.grad for v in model.trainable_variables]
    for variable, gradient in zip(model.trainable_variables, gradients):
        value = frameworks.array(variable) - rate * frameworks.array(gradient)
        variable.assign(value)
    return float(frameworks.array(loss))


def test_a_hand_written_loop():
    inputs = frameworks.tensor(_images(32)[0])
    pair = _pair()
    losses = [
        [_hand_written_step(model, inputs) for _ in range(3)] for model in pair
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[1][2] < losses[1][0]
    _same_weights(*pair)


# Models of all kinds.


class Subclassed(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.dense = keras.layers.Dense(4)
        self.normalization = layer()

    def call(self, inputs, training=None):
        return self.normalization(self.dense(inputs), training=training)


def _functional(layer):
    inputs = keras.Input((6, 3))
    x = keras.layers.Dense(4)(inputs)
    return keras.Model(inputs, layer(axis=1)(layer()(x)))


def _shared(layer):
    """One layer in two branches: each call takes its batch in."""
    shared = layer()
    a, b = keras.Input((6, 3)), keras.Input((6, 3))
    return keras.Model(
        [a, b], keras.layers.Add()([shared(a), 2.0 * shared(b + 1.0)])
    )


def _nested(layer):
    inner = keras.Sequential([keras.Input((6, 3)), layer(), layer(axis=1)])
    inputs = keras.Input((6, 3))
    return keras.Model(inputs, inner(inner(inputs)))


def _time_distributed(layer):
    return keras.Sequential(
        [keras.Input((6, 3)), keras.layers.TimeDistributed(layer())]
    )


@pytest.mark.parametrize(
    "build", [_functional, _shared, _nested, _time_distributed, Subclassed]
)
def test_models_of_every_kind(build):
    generator = np.random.default_rng(0)
    inputs = generator.normal(1.0, 2.0, (8, 6, 3)).astype("float32")
    if build is Subclassed:
        models = [build(KERAS), build(OURS)]
        for model in models:
            model(inputs)
        models[1].set_weights(models[0].get_weights())
    else:
        models = _pair(build)
    fed = [inputs, inputs[::-1]] if build is _shared else inputs
    for model in models:
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        for _ in range(2):
            model.train_on_batch(fed, np.zeros(model(fed).shape))
    _same_weights(*models)
    outputs = [model.predict(fed, verbose=0) for model in models]
    np.testing.assert_allclose(*outputs[::-1], rtol=1e-4, atol=1e-5)


def test_unknown_sizes():
    """Any batch and any image size through one symbolic model."""
    models = []
    for layer in (KERAS, OURS):
        inputs = keras.Input((None, None, 3))
        models.append(keras.Model(inputs, layer(momentum=0.5)(inputs)))
        assert models[-1].output_shape == (None, None, None, 3)
    generator = np.random.default_rng(0)
    for shape in [(4, 5, 6, 3), (1, 2, 3, 3), (7, 1, 1, 3)]:
        inputs = generator.normal(2.0, 1.0, shape).astype("float32")
        for training in (True, False):
            theirs, ours = (
                frameworks.array(m(inputs, training=training)) for m in models
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    _same_weights(*models)


def test_a_last_batch_that_is_smaller():
    images, labels = _images(41)
    pair = _pair()
    for model in pair:
        _compile(model).fit(
            images, labels, batch_size=16, shuffle=False, verbose=0
        )
    _same_weights(*pair)


def test_freezing_takes_effect_on_compile():
    images, labels = _images(64)
    model = _compile(_cnn(OURS))
    model.trainable = False
    _compile(model)
    before = model.get_weights()
    model.fit(images, labels, verbose=0)
    for now, then in zip(model.get_weights(), before):
        np.testing.assert_array_equal(now, then)


def test_constraints_hold_after_steps():
    layer = OURS(
        gamma_constraint=keras.constraints.NonNeg(),
        beta_constraint=keras.constraints.NonNeg(),
    )
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(5.0), loss="mse")
    inputs = np.random.default_rng(0).normal(size=(32, 3))
    model.fit(inputs, -inputs - 3.0, epochs=2, verbose=0)
    assert (frameworks.array(layer.gamma) >= 0).all()
    assert (frameworks.array(layer.beta) >= 0).all()
    assert (frameworks.array(layer.gamma) == 0).any()


# Saving.


def _trained(layer=OURS, build=_functional):
    model = build(layer)
    model.compile(optimizer="sgd", loss="mse")
    inputs = np.random.default_rng(0).normal(2.0, 3.0, (16, 6, 3))
    model.fit(inputs, np.zeros(model(inputs).shape), verbose=0)
    return model, inputs.astype("float32")


def test_a_model_saved_whole(tmp_path):
    """Without `custom_objects`: importing keras_bn is enough."""
    model, inputs = _trained()
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert sum(isinstance(x, OURS) for x in loaded.layers) == 2
    _same_weights(model, loaded, 0, 0)
    np.testing.assert_allclose(
        loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0)
    )


@pytest.mark.parametrize("renorm", [False, True])
def test_weights_saved_by_one_layer_and_loaded_by_the_other(tmp_path, renorm):
    def build(layer):
        return _functional(lambda **kwargs: layer(renorm=renorm, **kwargs))

    path = tmp_path / "model.weights.h5"
    for source, target in ((KERAS, OURS), (OURS, KERAS)):
        model, inputs = _trained(source, build)
        model.save_weights(path)
        other = build(target)
        # The file names layers by their class, as it does Keras's.
        other.load_weights(path)
        _same_weights(model, other, 0, 0)


def test_weights_in_h5(tmp_path):
    model, inputs = _trained()
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = _functional(OURS)
    other.load_weights(path)
    _same_weights(model, other, 0, 0)


def test_clone_model():
    model, inputs = _trained()
    clone = keras.models.clone_model(model)
    assert [type(x) for x in clone.layers] == [type(x) for x in model.layers]
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(
        clone.predict(inputs, verbose=0), model.predict(inputs, verbose=0)
    )

    def ours(layer):
        if isinstance(layer, KERAS):
            return OURS.from_config(layer.get_config())
        return layer.__class__.from_config(layer.get_config())

    theirs, inputs = _trained(KERAS)
    clone = keras.models.clone_model(theirs, clone_function=ours)
    clone.set_weights(theirs.get_weights())
    np.testing.assert_allclose(
        clone.predict(inputs, verbose=0),
        theirs.predict(inputs, verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )

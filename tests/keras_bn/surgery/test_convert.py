"""`convert`: Keras's layer and ours in each other's place, and other layers."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
from tests.keras_bn import frameworks
from tests.keras_bn.surgery import models

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization


def _outputs(model, inputs, training=False):
    return [
        frameworks.array(x)
        for x in keras.tree.flatten(model(inputs, training=training))
    ]


def _assert_within_ulp(count, found, expected):
    """Units in the last place of the largest output."""
    for one, other in zip(found, expected, strict=True):
        ulp = np.spacing(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=count * ulp)


def _triple(x):
    return 3.0 * x


class Block(layers.Layer):
    """A custom layer, not registered, whose config holds its parts."""

    def __init__(self, normalization, **kwargs):
        super().__init__(**kwargs)
        self.normalization = normalization

    def build(self, input_shape):
        self.shift = self.add_weight(shape=(), name="shift")
        self.normalization.build(input_shape)

    def call(self, inputs, training=None):
        return self.shift + self.normalization(inputs, training=training)

    def get_config(self):
        part = keras.saving.serialize_keras_object(self.normalization)
        return {**super().get_config(), "normalization": part}

    @classmethod
    def from_config(cls, config):
        part = keras.saving.deserialize_keras_object(config["normalization"])
        return cls(**{**config, "normalization": part})


def _model(layer):
    """Two inputs and outputs, shared and nested layers, wrappers, masks."""
    images = keras.Input((6, 6, 3), name="images")
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    shared = layer(name="shared", epsilon=1e-2)
    x = shared(layers.Conv2D(4, 3, activation=_triple)(images))
    x = x * 0.5 + shared(layers.Dropout(0.5, seed=3)(x))
    inner = keras.Sequential(
        [
            keras.Input((4, 4, 4)),
            layers.Conv2D(3, 3),
            layer(renorm=True, renorm_clipping={"rmax": 2.0}),
        ],
        name="inner",
    )
    x = inner(inner.layers[0](layers.ZeroPadding2D(1)(x))[..., :1] + x)
    x = layers.Lambda(lambda x: np.pi * x)(layers.Flatten()(x))
    y = layers.Embedding(7, 4, mask_zero=True)(tokens)
    y = layer(scale=False)(y)
    y = layers.TimeDistributed(layer(beta_regularizer="l2"))(y)
    y = Block(layer())(layers.GlobalAveragePooling1D()(y))
    first = layers.Dense(2, name="first")(layers.Concatenate()([x, y]))
    return keras.Model(
        {"images": images, "tokens": tokens},
        {"first": first, "second": layer(name="second", center=False)(y)},
        name="model",
    )


def _inputs():
    generator = np.random.default_rng(2)
    return {
        "images": generator.normal(size=(4, 6, 6, 3)).astype("float32"),
        "tokens": np.array(
            [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 1, 2, 3], [6, 6, 0, 0, 0]]
        ),
    }


def _graph(model):
    """Names and calls, at every depth."""
    config = model.get_config()

    def strip(value):
        if isinstance(value, dict):
            return {
                k: strip(v)
                for k, v in value.items()
                if k in ("name", "layers", "inbound_nodes", "config", "args")
                or k in ("keras_history", "input_layers", "output_layers")
            }
        if isinstance(value, (list, tuple)):
            return [strip(v) for v in value]
        return value

    return strip(config)


@pytest.mark.parametrize("there, here", [(KERAS, OURS), (OURS, KERAS)])
def test_between_the_two_layers(there, here):
    model = models.randomize(_model(there))
    model.layers[3].trainable = False
    model.compile(
        keras.optimizers.SGD(0.001, momentum=0.9),
        {"first": "mse", "second": keras.losses.Huber()},
        metrics={"first": ["mae"]},
    )
    inputs = _inputs()
    targets = {
        name: np.ones(x.shape, "float32")
        for name, x in model(inputs).items()
    }
    model.fit(inputs, targets, epochs=2, verbose=0)
    weights = model.get_weights()
    converted = keras_bn.convert(model, here)
    kinds = [type(x) for x in converted._flatten_layers()]
    assert kinds.count(there) == 0 and kinds.count(here) == 6
    for other, weight in zip(
        converted.get_weights(), weights, strict=True
    ):
        np.testing.assert_array_equal(other, weight)
    assert _graph(converted) == _graph(model)
    assert [x.trainable for x in converted._flatten_layers()] == [
        x.trainable for x in model._flatten_layers()
    ]
    assert converted.get_layer("shared").epsilon == 1e-2
    # Four layers of it in a row.
    _assert_within_ulp(
        16, _outputs(converted, inputs), _outputs(model, inputs)
    )
    # It goes on training where the model is.
    for one in (model, converted):
        one.fit(inputs, targets, epochs=2, verbose=0, shuffle=False)
    assert model.optimizer is not converted.optimizer
    assert int(frameworks.array(converted.optimizer.iterations.value)) == 4
    for other, weight, name in zip(
        converted.get_weights(),
        model.get_weights(),
        [w.path for w in model.weights],
        strict=True,
    ):
        np.testing.assert_allclose(other, weight, 1e-3, 1e-4, err_msg=name)
    # And back.
    again = keras_bn.convert(converted, there)
    for other, weight in zip(
        again.get_weights(), converted.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(other, weight)


@pytest.mark.parametrize("there, here", [(KERAS, OURS), (OURS, KERAS)])
@pytest.mark.parametrize("shape", [(7, 6, 5), (9, 5), (5,)])
def test_inference_of_one_layer(there, here, shape):
    model = keras.Sequential(
        [keras.Input(shape), layers.Dense(8), there(), layers.ReLU()]
    )
    models.randomize(model)
    inputs = np.random.default_rng(0).normal(2.0, 3.0, (16, *shape))
    inputs = inputs.astype("float32")
    converted = keras_bn.convert(model, here)
    _assert_within_ulp(
        4, _outputs(converted, inputs), _outputs(model, inputs)
    )


def application_differences(name):
    """How far an architecture and what it is converted to are apart.

    Returns:
        A pair for each direction: of the logits in inference, as a share of
        the largest one, and of the gradients for all weights in training, as a
        share of their norm.
    """
    model, images = models.application(name)
    inputs = frameworks.tensor(images, model.dtype)
    direction = np.random.default_rng(1).normal(size=(len(images), 10))
    direction = frameworks.tensor(direction, model.dtype)
    differences = []
    for there, here in ((KERAS, OURS), (OURS, KERAS)):
        converted = keras_bn.convert(model, here)
        assert not any(type(x) is there for x in converted._flatten_layers())
        for a, b in zip(converted.weights, model.weights, strict=True):
            np.testing.assert_array_equal(
                frameworks.array(a.value), frameworks.array(b.value)
            )
        (expected,), (found,) = (
            _outputs(x, inputs) for x in (model, converted)
        )
        outputs = np.abs(found - expected).max() / np.abs(expected).max()
        expected, found = (
            np.concatenate(
                [
                    x.ravel()
                    for x in frameworks.gradients_of_weights(
                        one, inputs, direction
                    )
                ]
            )
            for one in (model, converted)
        )
        gradients = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        differences.append((outputs, gradients))
        model = converted
    return differences


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ResNet50",
        "MobileNetV2",
        "EfficientNetB0",
        "DenseNet121",
        "Xception",
        "InceptionV3",
    ],
)
def test_applications(name):
    if frameworks.IS_TENSORFLOW:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
    try:
        differences = application_differences(name)
    finally:
        keras.config.set_floatx("float32")
    for outputs, gradients in differences:
        if frameworks.IS_TENSORFLOW:
            assert outputs < 1e-12 and gradients < 1e-9
        else:
            assert outputs < 1e-3 and gradients < 1e-2


@pytest.mark.parametrize("layer", [KERAS, OURS])
@pytest.mark.parametrize(
    "to, kind, groups",
    [
        ("group", layers.GroupNormalization, 20),
        ("instance", layers.GroupNormalization, 40),
        ("layer", layers.LayerNormalization, None),
    ],
)
@pytest.mark.parametrize("axis", [-1, 1])
def test_other_normalization(layer, to, kind, groups, axis):
    if to == "layer" and frameworks.IS_TORCH:
        # Keras's layer knows the last axis alone there.
        axis = -1
    shape = (5, 6, 40) if axis == -1 else (40, 5, 6)
    model = keras.Sequential(
        [keras.Input(shape), layer(axis=axis, epsilon=1e-4, name="norm")]
    )
    models.randomize(model)
    gamma, beta = model.get_weights()[:2]
    converted = keras_bn.convert(model, to)
    (one,) = converted.layers
    assert type(one) is kind and one.name == "norm" and one.epsilon == 1e-4
    assert getattr(one, "groups", None) == groups
    for weight, other in zip((gamma, beta), one.get_weights(), strict=True):
        np.testing.assert_array_equal(other, weight)
    inputs = np.random.default_rng(1).normal(2.0, 3.0, (2, *shape))
    inputs = inputs.astype("float32")
    x = np.moveaxis(inputs.astype("float64"), axis, -1)
    if to == "layer":
        mean, variance = (f(x, -1, keepdims=True) for f in (np.mean, np.var))
    else:
        parts = x.reshape(2, -1, groups, 40 // groups)
        mean, variance = (
            np.repeat(f(parts, (1, 3)), 40 // groups, -1)[:, None, None]
            for f in (np.mean, np.var)
        )
    x = (x - mean) / np.sqrt(variance + 1e-4) * gamma + beta
    np.testing.assert_allclose(
        _outputs(converted, inputs)[0], np.moveaxis(x, -1, axis), 1e-4, 1e-4
    )


def test_a_function():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), KERAS(name="a"), KERAS(name="b")]
    )
    models.randomize(model)

    def momentum(layer):
        return OURS(momentum=None, name=f"{layer.name}_cumulative")

    converted = keras_bn.convert(model, momentum)
    assert [x.name for x in converted.layers[1:]] == [
        "a_cumulative",
        "b_cumulative",
    ]
    for old, new in zip(model.layers, converted.layers, strict=True):
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            if hasattr(old, name):
                np.testing.assert_array_equal(
                    getattr(new, name).numpy(), getattr(old, name).numpy()
                )


class Stack(layers.Layer):
    """A custom layer whose config holds its parts in a list."""

    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.parts = [
            keras.saving.deserialize_keras_object(x)
            if isinstance(x, dict)
            else x
            for x in parts
        ]

    def build(self, input_shape):
        for part in self.parts:
            part.build(input_shape)

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs

    def get_config(self):
        parts = [keras.saving.serialize_keras_object(x) for x in self.parts]
        return {**super().get_config(), "parts": parts}


@pytest.mark.parametrize("there, here", [(KERAS, OURS), (OURS, KERAS)])
def test_lists_in_a_config(there, here):
    stack = Stack([there(epsilon=1e-2), layers.ReLU(), there(scale=False)])
    model = models.randomize(_sequential(stack))
    converted = keras_bn.convert(model, here)
    (new,) = converted.layers
    assert [type(x) for x in new.parts] == [here, layers.ReLU, here]
    inputs = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    _assert_within_ulp(
        8, _outputs(converted, inputs), _outputs(model, inputs)
    )


def _function(layer):
    """Sets nothing of what the layer was."""
    return layers.GroupNormalization(1, name=layer.name)


@pytest.mark.parametrize("to", [OURS, "layer", _function])
def test_what_is_trainable(to):
    """Of layers, of models as wholes, of one in a frozen model, of parts."""
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3), KERAS(name="in"), KERAS()],
        name="inner",
    )
    inputs = keras.Input((3,))
    x = KERAS(name="frozen")(layers.Dense(3, name="dense")(inputs))
    block = Block(KERAS(name="part"), name="block")
    x = KERAS(name="trained")(block(inner(x)))
    model = keras.Model(inputs, x)
    model.get_layer("dense").trainable = False
    model.get_layer("frozen").trainable = False
    inner.trainable = False
    inner.get_layer("in").trainable = True
    block.normalization.trainable = False
    converted = keras_bn.convert(model, to)
    expected, found = (
        {
            x.name: x.trainable
            for x in one._flatten_layers()
            if not isinstance(x, layers.InputLayer)
        }
        for one in (model, converted)
    )
    assert found == expected
    assert [name for name, flag in found.items() if flag] == [
        name
        for name in found
        if name in (model.name, "in", "block", "trained")
    ]
    # A model that is frozen as a whole.
    model.trainable = False
    assert not keras_bn.convert(model, to).trainable_variables


def test_options_that_keras_lacks():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            OURS(momentum=None, virtual_batch_size=2, name="ghost"),
            OURS(
                renorm=True,
                renorm_clipping=keras_bn.renorm_schedule(),
                unbiased_variance=True,
            ),
        ]
    )
    models.randomize(model)
    with pytest.warns(UserWarning, match="'ghost': .'virtual_batch_size', 'mo"):
        converted = keras_bn.convert(model, KERAS)
    inputs = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    _assert_within_ulp(
        8, _outputs(converted, inputs), _outputs(model, inputs)
    )
    converted(inputs, training=True)


class Derived(KERAS):
    pass


class MakesItself(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bn = KERAS()

    def call(self, inputs):
        return self.bn(inputs)


class NoConfig(layers.Layer):
    def __init__(self, size):
        super().__init__()

    def call(self, inputs):
        return inputs


class OwnCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.bn = KERAS()

    def call(self, inputs):
        return self.bn(inputs)


class OwnConstructor(keras.Model):
    def __init__(self, size):
        inputs = keras.Input((size,))
        super().__init__(inputs, KERAS()(inputs))


def _sequential(*parts):
    return keras.Sequential([keras.Input((3,)), *parts])


class TwoOutputs(layers.Layer):
    def call(self, inputs):
        return inputs, inputs


class TwoInputs(layers.Layer):
    def call(self, inputs, others):
        return inputs


_ONE = layers.LayerNormalization()
_ADVICE = (
    "Each place gets a layer of its own: "
    "`to=lambda layer: keras.layers.LayerNormalization(...)`."
)


@pytest.mark.parametrize("graph", ["sequential", "functional"])
@pytest.mark.parametrize(
    "to, message",
    [
        (layers.LayerNormalization(), _ADVICE),
        (layers.LayerNormalization, _ADVICE),
        (OURS(), "`to=lambda layer: keras_bn.BatchNormalization(...)`."),
        (int, "Received: to=<class 'int'>."),
        (None, "Received: to=None."),
        ("grup", "'group', 'layer', 'instance' or a function of a layer."),
        (lambda: layers.LayerNormalization(), "a function of a layer."),
        (lambda layer: None, "must return a new layer. Received: None"),
        (lambda layer: layers.LayerNormalization, "must return a new layer."),
        (lambda layer: _ONE, "which is in use already."),
        (lambda layer: layers.Dense(7), "outputs of shape (None, 7)"),
        (lambda layer: layers.Flatten(), None),
        (lambda layer: layers.Reshape((2, 2)), "shape (None, 2, 2)"),
        (lambda layer: TwoOutputs(), "of shape (None, 4), (None, 4)"),
        (lambda layer: TwoInputs(), "cannot call"),
        (lambda layer: layers.ReLU(name="same"), "'same"),
    ],
)
def test_what_takes_no_place_of_a_layer(graph, to, message):
    inputs = keras.Input((4,))
    first, second = KERAS(name="first"), KERAS(name="second")
    if graph == "sequential":
        model = keras.Sequential([inputs, first, layers.ReLU(), second])
    else:
        x = layers.Add()([inputs, first(inputs)])
        model = keras.Model(inputs, second(x))
    if message is None:
        keras_bn.convert(model, to)
        return
    with pytest.raises(ValueError) as error:
        keras_bn.convert(model, to)
    text = str(error.value).replace('"same"', "'same'")
    assert message in text and "\n" not in text


def test_what_a_function_raises_is_its_own():
    def wrong(layer):
        raise KeyError(layer.name)

    with pytest.raises(KeyError, match="batch_normalization"):
        keras_bn.convert(_sequential(KERAS()), wrong)


def test_bad_input():
    nested = keras.Sequential([layers.Add(), KERAS()])
    nested([np.ones((2, 3), "float32")] * 2)
    own = OwnCall()
    own(np.ones((2, 3), "float32"))
    sick = _sequential(KERAS())
    sick.layers[0].moving_mean.assign([0.0, np.inf, 0.0])
    axes = keras.Sequential([keras.Input((3, 4, 5)), OURS(axis=[1, 3])])
    batch = _sequential(OURS(use_moving_statistics=False))
    for model, to, message in (
        (own, OURS, "whose `call` is its own"),
        (nested, OURS, "was called with several"),
        (OwnConstructor(3), OURS, "keeps a model's class"),
        (_sequential(NoConfig(3), KERAS()), OURS, "cannot clone a layer"),
        (_sequential(MakesItself()), OURS, "in its own code"),
        (_sequential(Derived()), OURS, "no class derived from them"),
        (sick, OURS, "moving_mean not finite"),
        (axes, KERAS, "has one channel axis"),
        (axes, "group", "have one channel axis"),
        (batch, KERAS, "use_moving_statistics=False"),
        (_sequential(layers.Dense(3)), OURS, "found no batch normalization"),
        (keras.Sequential([KERAS()]), OURS, "that is built"),
        (_sequential(KERAS()), lambda layer: layer, "return a new layer"),
        (
            _sequential(KERAS()),
            lambda layer: layers.LayerNormalization(axis=[0, 1]),
            "cannot call",
        ),
        (None, OURS, "takes a keras.Model"),
    ):
        with pytest.raises(ValueError) as error:
            keras_bn.convert(model, to)
        assert message in str(error.value) and "\n" not in str(error.value)
    # Statistics that are dropped may be anything.
    keras_bn.convert(sick, "layer")

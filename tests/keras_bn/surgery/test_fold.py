"""`fold`: the same outputs as Keras's own layers with batch normalization."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
from experiments import article
from experiments import models as article_models
from tests.keras_bn import frameworks
from tests.keras_bn.surgery import models

OURS = keras_bn.BatchNormalization
BN = layers.BatchNormalization
BEFORE = "into the layer before"
AFTER = "into the layer after"
BOTH = "into the layers before and after"
LEFT = "multiply-add"
# Elsewhere Keras narrows float64 in some layers.
DTYPE = "float64" if frameworks.IS_TENSORFLOW else "float32"
TOLERANCE = 1e-12 if frameworks.IS_TENSORFLOW else 1e-5
IMAGE, SERIES, VOLUME = (6, 7, 4), (8, 3), (4, 4, 4, 3)

INTO_BEFORE = {
    "dense": (IMAGE, lambda: [layers.Dense(5), BN()]),
    "conv1d": (
        SERIES,
        lambda: [layers.Conv1D(5, 3, padding="causal"), BN()],
    ),
    "conv2d": (
        IMAGE,
        lambda: [
            layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False),
            OURS(),
        ],
    ),
    "conv3d": (VOLUME, lambda: [layers.Conv3D(5, 2), BN()]),
    "groups": (IMAGE, lambda: [layers.Conv2D(6, 3, groups=2), BN()]),
    "depthwise 1d": (
        SERIES,
        lambda: [layers.DepthwiseConv1D(3, depth_multiplier=2), BN()],
    ),
    "depthwise 2d": (
        IMAGE,
        lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2), BN()],
    ),
    "separable 1d": (SERIES, lambda: [layers.SeparableConv1D(5, 3), BN()]),
    "separable 2d": (
        IMAGE,
        lambda: [layers.SeparableConv2D(5, 3, depth_multiplier=2), BN()],
    ),
    "transpose 1d": (
        SERIES,
        lambda: [layers.Conv1DTranspose(5, 3, strides=2), BN()],
    ),
    "transpose 2d": (IMAGE, lambda: [layers.Conv2DTranspose(5, 3), BN()]),
    "transpose 3d": (VOLUME, lambda: [layers.Conv3DTranspose(5, 2), BN()]),
    "not scaled": (
        IMAGE,
        lambda: [layers.Conv2D(5, 3), BN(scale=False, center=False)],
    ),
    "means": (
        IMAGE,
        lambda: [
            layers.Conv2D(5, 3),
            layers.Dropout(0.5),
            layers.AveragePooling2D(2, padding="same"),
            layers.UpSampling2D(2),
            layers.Cropping2D(1),
            BN(),
        ],
    ),
    "global mean": (
        IMAGE,
        lambda: [layers.Conv2D(5, 3), layers.GlobalAveragePooling2D(), BN()],
    ),
    "reshape": (
        (5,),
        lambda: [layers.Dense(12), layers.Reshape((3, 4)), BN()],
    ),
    "permute": (
        IMAGE,
        lambda: [layers.Conv2D(5, 3), layers.Permute((3, 1, 2)), BN(axis=1)],
    ),
}
INTO_AFTER = {
    "dense": ((5,), lambda: [BN(), layers.Dense(3, activation="relu")]),
    "dense of rank 4": (IMAGE, lambda: [BN(), layers.Dense(3)]),
    "valid": (
        IMAGE,
        lambda: [OURS(), layers.Conv2D(6, 3, groups=2, strides=2)],
    ),
    "1x1": (IMAGE, lambda: [BN(), layers.Conv2D(5, 1, padding="same")]),
    "flatten": (
        IMAGE,
        lambda: [BN(), layers.Flatten(), layers.Dense(3)],
    ),
    "several axes": (
        IMAGE,
        lambda: [OURS(axis=[1, 3]), layers.Flatten(), layers.Dense(3)],
    ),
    "permute": (
        IMAGE,
        lambda: [
            BN(),
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(3),
        ],
    ),
    "global mean": (
        IMAGE,
        lambda: [BN(), layers.GlobalAveragePooling2D(), layers.Dense(3)],
    ),
}
PADDED = {
    "same": lambda: [layers.Conv2D(5, 3, padding="same")],
    "same, even": lambda: [layers.Conv2D(5, 4, padding="same")],
    "same, strides": lambda: [layers.Conv2D(5, 3, strides=2, padding="same")],
    "same, dilation": lambda: [
        layers.Conv2D(6, 3, dilation_rate=2, groups=2, padding="same")
    ],
    "depthwise": lambda: [
        layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")
    ],
    "separable": lambda: [
        layers.SeparableConv2D(5, 3, depth_multiplier=2, padding="same")
    ],
    "zero padding": lambda: [
        layers.ZeroPadding2D(((1, 0), (2, 1))),
        layers.Conv2D(5, 3),
    ],
    "both": lambda: [
        layers.ZeroPadding2D(((1, 0), (2, 1))),
        layers.Dropout(0.5),
        layers.Conv2D(5, 3, padding="same"),
    ],
    "causal": lambda: [
        layers.Reshape((42, 4)),
        layers.Conv1D(5, 3, padding="causal", dilation_rate=2),
    ],
}


@pytest.fixture(autouse=True)
def _precision():
    _set_precision(DTYPE)
    yield
    keras.config.set_floatx("float32")


def _set_precision(dtype):
    # Keras narrows what is wider than either.
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def _outputs(model, inputs):
    return keras.tree.map_structure(
        frameworks.array, model(inputs, training=False)
    )


def _folded(model, shape):
    """The folded model, after a comparison of outputs."""
    inputs = np.random.default_rng(1).normal(size=(3, *shape)).astype(DTYPE)
    folded = keras_bn.fold(model)
    expected = _outputs(model, inputs)
    np.testing.assert_allclose(
        _outputs(folded, inputs),
        expected,
        rtol=0,
        atol=TOLERANCE * np.abs(expected).max(),
    )
    return folded


def _fold(shape, parts, gamma="both signs"):
    model = keras.Sequential([keras.Input(shape), *parts])
    folded = _folded(models.randomize(model, gamma), shape)
    return folded, [one.how for one in folded.fold_report]


def _has_batch_normalization(model):
    return any(isinstance(x, (BN, OURS)) for x in model._flatten_layers())


@pytest.mark.parametrize("name", INTO_BEFORE)
def test_into_the_layer_before(name):
    shape, parts = INTO_BEFORE[name]
    folded, hows = _fold(shape, parts(), "some zero")
    assert hows == [BEFORE] and not _has_batch_normalization(folded)


@pytest.mark.parametrize("name", INTO_AFTER)
def test_into_the_layer_after(name):
    shape, parts = INTO_AFTER[name]
    folded, hows = _fold(shape, parts(), "some zero")
    assert hows == [AFTER] and not _has_batch_normalization(folded)


@pytest.mark.parametrize("name", PADDED)
def test_padding_with_what_is_normalized_to_zero(name):
    folded, hows = _fold(IMAGE, [BN(), *PADDED[name]()])
    assert hows == [AFTER] and not _has_batch_normalization(folded)
    # A channel that is a constant is mapped to 0 nowhere.
    _, hows = _fold(IMAGE, [BN(), *PADDED[name]()], "some zero")
    assert hows == [LEFT]


@pytest.mark.parametrize("pooling", [layers.MaxPooling2D, "global"])
@pytest.mark.parametrize("gamma", ["positive", "both signs"])
def test_maxima(pooling, gamma):
    pooling = layers.GlobalMaxPooling2D if pooling == "global" else pooling
    before = [layers.Conv2D(5, 3), pooling(), BN()]
    after = [BN(), pooling(), layers.Flatten(), layers.Dense(3)]
    expected = [BEFORE, AFTER] if gamma == "positive" else [LEFT, LEFT]
    found = []
    for parts in (before, after):
        folded, (how,) = _fold(IMAGE, parts, gamma)
        found.append(how)
        (one,) = folded.fold_report
        assert ("gamma is negative in " in one.reason) == (how == LEFT)
    assert found == expected


def test_channels_first():
    first = {"data_format": "channels_first"}
    if frameworks.IS_TENSORFLOW:
        # Its CPU kernels have channels last only.
        parts = [OURS(axis=1), layers.Flatten(**first), layers.Dense(3)]
        expected = [AFTER]
    else:
        parts = [
            layers.Conv2D(3, 3, **first),
            BN(axis=1),
            layers.ReLU(),
            BN(axis=1),
            layers.ZeroPadding2D(1, **first),
            layers.Conv2D(3, 3, padding="same", **first),
        ]
        expected = [BEFORE, BOTH]
    assert _fold(IMAGE, parts)[1] == expected


@pytest.mark.parametrize(
    "parts, reason",
    [
        (
            lambda: [layers.Conv2D(5, 3, activation="relu"), BN()],
            "activation of 'conv",
        ),
        (
            lambda: [layers.Dense(5), layers.ReLU(), BN()],
            "ReLU '.*' comes before it",
        ),
        (
            lambda: [BN(), layers.ReLU(), layers.Dense(3)],
            "ReLU '.*' comes after it",
        ),
        (
            lambda: [layers.Dense(4), BN(axis=1)],
            "depends on more than the channel",
        ),
        (
            lambda: [BN(), layers.Conv2DTranspose(3, 3)],
            "not all of the same weights",
        ),
        (
            lambda: [layers.Conv2D(3, 3), layers.ZeroPadding2D(1), BN()],
            "before it pads with zeros",
        ),
    ],
)
def test_left_alone(parts, reason):
    folded, hows = _fold(IMAGE, parts())
    assert hows == [LEFT]
    assert re.search(reason, folded.fold_report[0].reason)


def test_chains():
    """What is folded lets the next one through."""
    _, hows = _fold(IMAGE, [BN(), layers.Dropout(0.1), BN(), layers.Dense(3)])
    assert hows == [AFTER, AFTER]
    parts = [
        BN(),
        layers.Conv2D(3, 3, padding="same"),
        BN(),
        BN(),
        layers.ReLU(),
        BN(),
        BN(),
        layers.Conv2D(3, 3, padding="same"),
    ]
    folded, hows = _fold(IMAGE, parts)
    assert hows == [AFTER, BEFORE, BEFORE, BOTH, AFTER]
    assert len(folded.layers) == 5


def test_a_graph(tmp_path):
    """Branches, shared layers, nested models, several outputs."""
    inputs = keras.Input(IMAGE)
    shared = layers.Conv2D(4, 3, name="shared")
    both = BN(name="both")
    twice = both(shared(inputs)) + both(shared(-inputs))
    inner = keras.Sequential(
        [layers.Conv2D(3, 2), BN(name="bn"), layers.ReLU()], name="inner"
    )
    # Its convolution's outputs go elsewhere too.
    x = layers.Conv2D(4, 3)(inner(twice))
    branches = [BN(name="branch")(x), x]
    # Two layers after it take it in.
    y = BN(name="two")(inner(twice))
    ends = [layers.Flatten()(layers.Dense(2)(y)), layers.Conv2D(2, 2)(y)]
    end = BN(name="end")(layers.Dense(2, name="head")(ends[0]))
    model = keras.Model(
        inputs, {"end": end, "other": ends[1], "sum": layers.Add()(branches)}
    )
    models.randomize(model)
    before = model.get_weights()
    folded = keras_bn.fold(model)
    values = np.random.default_rng(1).normal(size=(3, *IMAGE)).astype(DTYPE)
    expected = _outputs(model, values)
    for name, found in _outputs(folded, values).items():
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            found, expected[name], 0, 10 * TOLERANCE * size
        )
    how = {one.layer: one.how for one in folded.fold_report}
    assert how == {
        "both": LEFT,
        "inner/bn": BEFORE,
        "branch": LEFT,
        "two": AFTER,
        "end": BEFORE,
    }
    report = {one.layer: one for one in folded.fold_report}
    assert "used more than once" in report["both"].reason
    assert "go elsewhere too" in report["branch"].reason
    assert report["inner/bn"].into == ("inner/conv2d",)
    assert len(folded.fold_report.folded) == 3
    assert "both" in str(folded.fold_report)
    # The original is as it was, and both can be saved.
    for then, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, then)
    assert folded.output_names == model.output_names
    folded.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    for name, found in _outputs(loaded, values).items():
        np.testing.assert_array_equal(found, _outputs(folded, values)[name])


@pytest.mark.parametrize("depth", ["flat", "nested"])
def test_layers_that_are_used_with_different_inputs(depth):
    """What is shared cannot take in two normalizations, and keeps its own."""
    conv = layers.Conv2D(4, 3, padding="same", name="shared")
    norm = OURS(name="used_twice")
    if depth == "nested":
        conv = keras.Sequential([keras.Input(IMAGE), conv, BN(name="in")])
    inputs = keras.Input(IMAGE)
    x, y = conv(inputs), conv(0.5 * inputs)
    x, y = BN(name="of_x")(x), BN(name="of_y")(y)
    x, y = (layers.Conv2D(4, 3)(z) for z in (x, y))
    outputs = norm(x) - norm(y)
    model = models.randomize(keras.Model(inputs, outputs))
    folded = _folded(model, IMAGE)
    how = {one.layer: one.how for one in folded.fold_report}
    expected = {"of_x": AFTER, "of_y": AFTER, "used_twice": LEFT}
    if depth == "nested":
        expected = {"sequential/in": BEFORE, **expected}
    assert how == expected
    reasons = {one.layer: one.reason for one in folded.fold_report}
    assert "'used_twice' is used more than once" in reasons["used_twice"]


def test_what_is_no_inference_is_kept():
    inputs = keras.Input((4,))
    x = layers.Dense(4)(inputs)
    x = BN(name="trains")(x, training=True)
    x = OURS(use_moving_statistics=False, name="batch")(x)
    x = layers.TimeDistributed(layers.Dense(4))(layers.Reshape((1, 4))(x))
    x = layers.TimeDistributed(BN(name="inside"))(x)
    model = models.randomize(keras.Model(inputs, x))
    folded = keras_bn.fold(model)
    assert [(x.layer, x.how) for x in folded.fold_report] == [
        ("trains", "kept"),
        ("batch", "kept"),
        ("time_distributed_1/inside", "kept"),
    ]
    values = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
    np.testing.assert_allclose(
        _outputs(folded, values), _outputs(model, values), 1e-5, 1e-5
    )


def test_the_table_says_what_goes_where():
    """In the order of the graph."""
    parts = [
        layers.Conv2D(4, 3, activation="relu", name="first"),
        BN(name="norm"),
        layers.ZeroPadding2D(1, name="border"),
        layers.Conv2D(3, 3, name="second"),
    ]
    folded, _ = _fold(IMAGE, parts)
    *_, row = str(folded.fold_report).splitlines()
    assert row.split(maxsplit=1) == [
        "norm",
        f"{BOTH}  first (scale), border, second (sign and shift)",
    ]
    assert folded.fold_report.folded and not folded.fold_report.left


@pytest.mark.parametrize(
    "shape, layer",
    [
        ((None, 3), lambda: layers.Conv1D(5, 3, strides=2, padding="same")),
        (
            (None, None, 3),
            lambda: layers.Conv2D(5, 3, strides=2, padding="same"),
        ),
        (
            (None, 7, 3),
            lambda: layers.DepthwiseConv2D(3, strides=2, padding="same"),
        ),
        (
            (None, None, None, 3),
            lambda: layers.Conv3D(5, 2, strides=3, padding="same"),
        ),
        ((None, 3), lambda: layers.SeparableConv1D(5, 3, 2, padding="same")),
    ],
)
def test_a_padding_that_depends_on_an_unknown_size(shape, layer):
    model = keras.Sequential([keras.Input(shape), BN(), layer()])
    models.randomize(model)
    sizes = [7 if n is None else n for n in shape]
    folded = _folded(model, sizes)
    (one,) = folded.fold_report
    assert one.how == LEFT and "a size that is not known" in one.reason
    # Where each window is one pixel there is no padding.
    thin = layers.Conv2D(5, (3, 1), strides=(1, 2), padding="same")
    model = keras.Sequential([keras.Input((None, None, 3)), BN(), thin])
    folded = _folded(models.randomize(model), (5, 7, 3))
    assert [x.how for x in folded.fold_report] == [AFTER]


@pytest.mark.parametrize("window", [(3, 1), (1, 3)])
def test_windows_of_one_pixel_along_an_axis(window):
    """'same' pads the other axis, with what is normalized to zero."""
    conv = layers.Conv2D(5, window, padding="same")
    _, hows = _fold(IMAGE, [BN(), conv])
    assert hows == [AFTER]


@pytest.mark.parametrize("conv", ["valid", "same"])
def test_what_is_padded_already_by_another(conv):
    """The second border is what the first one is of."""
    padding = layers.ZeroPadding2D(1, name="zero")
    conv = layers.Conv2D(3, 3, padding=conv, name="conv")
    folded, hows = _fold(IMAGE, [BN(), BN(), padding, conv])
    assert hows == [AFTER, AFTER]
    assert [x.into for x in folded.fold_report] == 2 * [("zero", "conv")]


def test_a_layer_after_that_others_use_too():
    first, second = keras.Input((4,)), keras.Input((4,))
    dense = layers.Dense(3, name="dense")
    outputs = [dense(BN(name="norm")(first)), dense(second)]
    model = models.randomize(keras.Model([first, second], outputs))
    folded = keras_bn.fold(model)
    (one,) = folded.fold_report
    assert one.how == LEFT and "'dense' is used more than once" in one.reason
    generator = np.random.default_rng(1)
    values = [generator.normal(size=(3, 4)).astype(DTYPE) for _ in range(2)]
    pairs = zip(_outputs(folded, values), _outputs(model, values))
    for found, expected in pairs:
        size = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, 0, TOLERANCE * size)


def _inner(*parts, training=None, shape=(4,)):
    """A model whose last layer was called with `training`."""
    *parts, last = parts
    inputs = x = keras.Input(shape)
    for part in parts:
        x = part(x)
    given = {} if training is None else {"training": training}
    return keras.Model(inputs, last(x, **given))


def _given_to_the_layer(training):
    return _inner(layers.Dense(4), BN(name="it"), training=training)


def _given_to_a_model(training):
    inner = _inner(layers.Dense(4), BN(name="it"))
    middle = keras.Sequential([keras.Input((4,)), inner, layers.Dense(4)])
    return _inner(middle, training=training)


def _inside_of_false(training):
    inner = _inner(layers.Dense(4), BN(name="it"), training=False)
    return _inner(inner, training=training)


def _once_in_training(training):
    inner = _inner(layers.Dense(4), BN(name="it"))
    inputs = keras.Input((4,))
    return keras.Model(
        inputs, [inner(inputs), inner(2.0 * inputs, training=training)]
    )


def _in_the_call_before(training):
    """As Keras 3.15 has it: one `training` for all that is called."""
    dropout = _inner(layers.Dropout(0.5, seed=1), training=training)
    return _inner(dropout, layers.Dense(4), BN(name="it"))


class CallsWithTraining(layers.Layer):
    def __init__(self, training, **kwargs):
        super().__init__(**kwargs)
        self.inside = layers.Dropout(0.0, seed=1)
        self.training = training

    def call(self, inputs):
        return self.inside(inputs, training=self.training)

    def get_config(self):
        return {**super().get_config(), "training": self.training}


def _in_the_code_of_the_layer_before(training):
    return _inner(CallsWithTraining(training), layers.Dense(4), BN(name="it"))


def _replaced_on_the_way(training):
    """What is folded no longer says it to those after it."""
    inputs = keras.Input((4,))
    x = BN(name="it")(inputs, training=training)
    x = BN(name="gone")(layers.Dense(4)(x), training=False)
    x = BN(name="next")(layers.Dense(4)(x))
    return keras.Model(inputs, x)


def _other_branch(training):
    """Which of two branches runs first is not what it was."""
    inputs = keras.Input((4,))
    x = BN(name="gone")(layers.Dense(4)(inputs), training=False)
    x = BN(name="it")(layers.Dense(4)(x), training=training)
    y = layers.Dense(4)(layers.Dense(4)(layers.Dense(4)(inputs)))
    return keras.Model(inputs, [x, BN(name="other")(y)])


@pytest.mark.parametrize("training", [True, 1, np.True_, False, None])
@pytest.mark.parametrize(
    "made",
    [
        _given_to_the_layer,
        _given_to_a_model,
        _inside_of_false,
        _once_in_training,
        _in_the_call_before,
        _in_the_code_of_the_layer_before,
        _replaced_on_the_way,
        _other_branch,
    ],
)
def test_training_that_calls_were_made_with(made, training):
    """Keras's own outputs, by which layer or model it was given to."""
    if isinstance(training, np.bool_) and "code" in made.__name__:
        training = True
    model = models.randomize(made(training))
    inputs = np.random.default_rng(1).normal(size=(5, 4)).astype(DTYPE)
    folded = keras_bn.fold(model)
    how = {x.layer.split("/")[-1]: x.how for x in folded.fold_report}
    assert (how["it"] == "kept") == bool(training)
    converted = keras_bn.convert(model, OURS)
    for arguments in ({}, {"training": False}):
        expected = keras.tree.flatten(model(inputs, **arguments))
        for one in (folded, converted):
            found = keras.tree.flatten(one(inputs, **arguments))
            for a, b in zip(found, expected, strict=True):
                # With the batch's moments errors are divided by deviations
                # down to 0.1 here, three times in a row.
                size = 1e3 * np.abs(frameworks.array(b)).max()
                np.testing.assert_allclose(
                    frameworks.array(a),
                    frameworks.array(b),
                    rtol=0,
                    atol=TOLERANCE * size,
                )


class NormalizesInTraining(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = BN()

    def call(self, inputs):
        return self.inside(inputs, training=True)


def test_parts_that_are_frozen():
    """They use the moving statistics, whatever they are called with."""
    custom = NormalizesInTraining()
    model = keras.Sequential([keras.Input((4,)), custom, BN()])
    models.randomize(model)
    custom.inside.trainable = False
    inputs = np.random.default_rng(1).normal(size=(5, 4)).astype(DTYPE)
    expected = frameworks.array(model(inputs))
    found = frameworks.array(keras_bn.fold(model)(inputs))
    np.testing.assert_array_equal(found, expected)


def test_a_mask_that_is_an_argument_goes_on():
    """What follows averages over what the mask keeps."""
    inputs, mask = keras.Input((5, 3)), keras.Input((5,), dtype="bool")
    pooling, dense = layers.GlobalAveragePooling1D(), layers.Dense(2)
    generator = np.random.default_rng(1)
    values = [
        generator.normal(size=(4, 5, 3)).astype(DTYPE),
        generator.random((4, 5)) < 0.5,
    ]
    values[1][:, 0] = True
    for call, how in (
        (lambda bn: bn(inputs, mask=mask), LEFT),
        (lambda bn: bn(inputs=inputs, mask=mask), LEFT),
        # To Keras's layers this is no mask of the outputs.
        (lambda bn: bn(inputs, None, mask), AFTER),
    ):
        outputs = dense(pooling(call(BN(name="it"))))
        model = models.randomize(keras.Model([inputs, mask], outputs))
        folded, converted = keras_bn.fold(model), keras_bn.convert(model)
        (one,) = folded.fold_report
        assert one.how == how
        assert ("called with a mask" in one.reason) == (how == LEFT)
        # With `training` as well Keras refuses the last of these calls.
        expected = frameworks.array(model(values))
        for found in (folded, converted):
            np.testing.assert_allclose(
                frameworks.array(found(values)), expected, 1e-5, 1e-5
            )
        # Of another kind, a layer may take no mask.
        keras_bn.convert(model, "group")


def test_inputs_by_name():
    inputs = keras.Input((4,))
    outputs = layers.Dense(3)(BN()(inputs=inputs))
    folded = _folded(models.randomize(keras.Model(inputs, outputs)), (4,))
    assert [x.how for x in folded.fold_report] == [AFTER]


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("layer", [BN, OURS])
@pytest.mark.parametrize("between", ["nothing", "relu", "nested"])
def test_integers(dtype, layer, between):
    """Normalization makes floats of them, and a convolution does not."""
    inputs = keras.Input(IMAGE, dtype=dtype)
    x = inputs
    if between == "relu":
        x = layers.ReLU()(inputs)
    if between == "nested":
        inner = keras.Input(IMAGE, dtype=dtype)
        x = keras.Model(inner, layers.ReLU()(inner))(inputs)
    x = layer()(x)
    outputs = layers.Conv2D(3, 3, padding="same")(x)
    model = models.randomize(keras.Model(inputs, outputs))
    folded = keras_bn.fold(model)
    (one,) = folded.fold_report
    assert one.how == LEFT and "may be integers" in one.reason
    values = np.random.default_rng(1).integers(0, 255, (3, *IMAGE), dtype)
    expected = _outputs(model, values)
    size = np.abs(expected).max()
    np.testing.assert_allclose(
        _outputs(folded, values), expected, 0, 1e-5 * size
    )


def test_dtypes_stay():
    """Normalization in float32 behind a layer in bfloat16."""
    inputs = keras.Input((4,))
    x = layers.Dense(4, dtype="mixed_bfloat16")(inputs)
    x = BN(dtype="float32", name="inside")(x)
    y = BN(dtype="float32", name="end")(layers.Dense(2)(keras.ops.exp(x)))
    model = models.randomize(keras.Model(inputs, [keras.ops.square(x), y]))
    folded = keras_bn.fold(model)
    assert [x.how for x in folded.fold_report] == [BEFORE, BEFORE]
    assert [x.dtype for x in folded.outputs] == [x.dtype for x in model.outputs]
    assert folded.output_names == model.output_names


@pytest.mark.parametrize("layer", ["keras", "keras_bn"])
def test_the_articles_network(layer):
    """After ReLU, then pooling and a 'same' convolution, or the dense layer."""
    condition = article.CONDITIONS[11]
    model = article_models.build(condition, layer=layer)
    folded = _folded(models.randomize(model, "positive"), (32, 32, 3))
    assert [(x.how, x.into) for x in folded.fold_report] == [
        (BOTH, ("conv1", "conv2")),
        (BOTH, ("conv2", "dense")),
        (BOTH, ("dense", "logits")),
    ]
    folded = _folded(models.randomize(model), (32, 32, 3))
    assert [x.how for x in folded.fold_report] == [LEFT, LEFT, BOTH]


@pytest.mark.parametrize(
    "between",
    [
        lambda: [layers.Activation("relu")],
        lambda: [layers.ReLU(negative_slope=0.1)],
        lambda: [layers.LeakyReLU(), layers.AveragePooling2D(2)],
        lambda: [layers.ReLU(), layers.GlobalMaxPooling2D()],
    ],
)
def test_scales_pass_a_relu(between):
    """What is between the layers keeps the range that it had normalized."""
    parts = [layers.Conv2D(4, 3), *between(), BN(), layers.Dense(3)]
    folded, hows = _fold(IMAGE, parts, "some zero")
    (one,) = folded.fold_report
    assert hows == [BOTH]
    assert [name.split("_")[0] for name in one.into] == ["conv2d", "dense"]


@pytest.mark.parametrize(
    "between", [lambda: layers.ReLU(max_value=6.0), lambda: layers.ELU()]
)
def test_scales_that_stay_behind(between):
    parts = [layers.Conv2D(4, 3), between(), BN(), layers.Dense(3)]
    folded, hows = _fold(IMAGE, parts)
    (one,) = folded.fold_report
    assert hows == [AFTER] and len(one.into) == 1


def test_before_quantization():
    """Keras takes one scale for all units that a dense layer reads."""
    _set_precision("float32")
    units = 64
    bn = BN(momentum=0.0)
    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(units, activation="relu"),
            bn,
            layers.Dense(8),
        ]
    )
    models.randomize(model)
    generator = np.random.default_rng(2)
    # Units of very different size, which normalization makes alike.
    sizes = 10.0 ** generator.uniform(-2, 2, units)
    first = model.layers[0]
    first.kernel.assign(generator.normal(size=(16, units)) * sizes)
    first.bias.assign(generator.normal(size=units) * sizes)
    inputs = generator.normal(size=(256, 16)).astype("float32")
    model(inputs, training=True)
    expected = _outputs(model, inputs)
    folded = keras_bn.fold(model)
    folded.quantize("int8")
    model.quantize("int8")
    deviation = expected.std()
    plain, found = (
        np.abs(_outputs(x, inputs) - expected).mean() / deviation
        for x in (model, folded)
    )
    assert 0.0 < found < 1.5 * plain < 0.05


FOLDED_BEFORE = {
    "ResNet50": 53,
    "MobileNetV2": 52,
    "EfficientNetB0": 49,
    "DenseNet121": 59,
    "Xception": 40,
    "InceptionV3": 94,
}


def _check_application(name, dtype):
    _set_precision(dtype)
    model, images = models.application(name)
    folded = keras_bn.fold(model)
    expected = _outputs(model, images)
    deviation = expected.std(0).mean()
    assert deviation > 0.05 * np.abs(expected).mean()
    difference = np.abs(_outputs(folded, images) - expected).max()
    if dtype == "float64":
        assert difference < 1e-9 * np.abs(expected).max()
    else:
        assert difference < 1e-3 * deviation
    hows = [one.how for one in folded.fold_report]
    assert hows.count(BEFORE) == FOLDED_BEFORE[name]
    assert set(hows) <= {BEFORE, AFTER, BOTH, LEFT}
    assert (len(hows) == FOLDED_BEFORE[name]) == (name != "DenseNet121")


# Without a graph of the framework's each of their operations takes its time.
_QUICK = ["MobileNetV2", "EfficientNetB0"] if frameworks.IS_TENSORFLOW else []


@pytest.mark.parametrize(
    "dtype", ["float32", "float64"] if frameworks.IS_TENSORFLOW else ["float32"]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
        for name in FOLDED_BEFORE
    ],
)
def test_applications(name, dtype):
    _check_application(name, dtype)


def test_bad_input():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = BN()

        def call(self, inputs):
            return self.bn(inputs)

    class NoConfig(layers.Layer):
        def __init__(self, size):
            super().__init__()

        def call(self, inputs):
            return inputs

    own = Own()
    own(np.ones((2, 3), "float32"))
    sick = keras.Sequential([keras.Input((3,)), layers.Dense(3), BN()])
    sick.layers[1].moving_variance.assign([1.0, np.nan, 1.0])
    strange = keras.Sequential([keras.Input((3,)), NoConfig(3), BN()])
    for model, message in (
        (own, "whose `call` is its own"),
        (sick, "moving_variance not finite"),
        (strange, "cannot clone a layer. Received: layer 'no_config'"),
        (keras.Sequential([layers.Dense(3), BN()]), "that is built"),
        (keras.Sequential([keras.Input((3,)), layers.Dense(3)]), "found no"),
        ("model", "takes a keras.Model"),
    ):
        with pytest.raises(ValueError, match="`fold` ") as error:
            keras_bn.fold(model)
        assert message in str(error.value) and "\n" not in str(error.value)

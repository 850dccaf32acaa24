"""`convert` of models and files of tf-keras (Keras 2)."""

import zipfile

import keras
import numpy as np
import pytest
import tf_keras

import keras_bn
import keras_bn_command
from tests.keras_bn import frameworks

layers = tf_keras.layers


def _model():
    inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv", activation="relu")(inputs)
    x = layers.BatchNormalization(axis=[3], fused=True, name="fused")(x)
    x = layers.BatchNormalization(virtual_batch_size=2, name="ghost")(x)
    x = layers.BatchNormalization(axis=[1, 3], name="axes")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.BatchNormalization(
        renorm=True, renorm_clipping={"rmax": 2.0, "dmax": 1.0}, name="renorm"
    )(x)
    part = layers.Input((4, 4, 4))
    y = layers.Conv2D(2, 3, name="conv")(part)
    y = layers.BatchNormalization(name="inside", momentum=0.9)(y)
    part = tf_keras.Model(part, y, name="part")
    inner = tf_keras.Sequential(
        [
            layers.Input((4, 4, 4)),
            layers.Conv2D(2, 3),
            layers.BatchNormalization(name="sequential"),
        ],
        name="inner",
    )
    x = layers.Add()([inner(x), part(x)])
    x = layers.Reshape((4, 2))(x)
    x = layers.Bidirectional(layers.LSTM(3))(x)
    x = layers.BatchNormalization(name="last", scale=False)(x)
    model = tf_keras.Model(inputs, layers.Dense(3)(x))
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if "variance" in weight.name or "stddev" in weight.name:
            weight.assign(generator.uniform(0.5, 1.5, weight.shape))
        else:
            weight.assign(generator.normal(0.0, 0.5, weight.shape))
    model.compile("adam", "mse")
    return model


@pytest.mark.parametrize("kind", ["object", "model.h5", "model.keras"])
def test_models(kind, tmp_path):
    theirs = _model()
    source = theirs
    if kind != "object":
        source = tmp_path / kind
        theirs.save(source)
    ours = keras_bn.convert(source)
    assert isinstance(ours, keras.Model)
    assert [x.name for x in ours.layers] == [x.name for x in theirs.layers]
    inputs = np.random.default_rng(1).normal(size=(4, 8, 8, 3))
    inputs = inputs.astype("float32")
    np.testing.assert_allclose(
        ours.predict(inputs, verbose=0), theirs(inputs).numpy(), 1e-5, 1e-5
    )
    assert not ours.compiled
    found = {
        x.name: x
        for x in ours._flatten_layers()
        if isinstance(x, keras_bn.BatchNormalization)
    }
    assert found["ghost"].virtual_batch_size == 2
    assert found["ghost"].axis == 3 and found["axes"].axis == [1, 3]
    assert found["renorm"].renorm_clipping == {"rmax": 2.0, "dmax": 1.0}
    assert {name for name, x in found.items() if x.unbiased_variance} == {
        "fused",
        "inside",
        "sequential",
    }
    assert found["inside"].momentum == 0.9
    for name in ("gamma", "moving_variance"):
        expected = getattr(theirs.get_layer("axes"), name).numpy()
        np.testing.assert_array_equal(
            getattr(found["axes"], name).numpy(), expected
        )


def test_training_goes_on_the_same():
    """As the fused layer does, with Bessel's correction."""
    theirs = tf_keras.Sequential(
        [layers.Input((4, 4, 3)), layers.BatchNormalization()]
    )
    ours = keras_bn.convert(theirs)
    inputs = np.random.default_rng(1).normal(2.0, 3.0, (3, 4, 4, 3))
    inputs = inputs.astype("float32")
    for model in (theirs, ours):
        model(inputs, training=True)
    for found, expected in zip(
        ours.get_weights(), theirs.get_weights(), strict=True
    ):
        np.testing.assert_allclose(found, expected, 1e-5)


def test_files_of_keras_3(tmp_path):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.BatchNormalization()]
    )
    model.layers[0].beta.assign([1.0, 2.0, 3.0, 4.0])
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        converted = keras_bn.convert(tmp_path / name)
        (layer,) = converted.layers
        assert isinstance(layer, keras_bn.BatchNormalization)
        np.testing.assert_array_equal(layer.beta.numpy(), [1, 2, 3, 4])


@pytest.mark.parametrize("kind", ["model.h5", "model.keras"])
def test_the_command(kind, tmp_path, capsys):
    theirs = _model()
    theirs.save(tmp_path / kind)
    output = tmp_path / "new.keras"
    arguments = [str(tmp_path / kind), "--output", str(output)]
    assert keras_bn_command.main(["convert", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "converted 7 batch normalizations to keras_bn\n" in printed
    inputs = np.random.default_rng(1).normal(size=(4, 8, 8, 3))
    inputs = inputs.astype("float32")
    np.testing.assert_allclose(
        frameworks.array(keras.saving.load_model(output)(inputs)),
        theirs(inputs).numpy(),
        1e-5,
        1e-5,
    )


def test_functions_that_do_not_take_their_models():
    for function in (keras_bn.fold, keras_bn.audit):
        with pytest.raises(ValueError, match="`keras_bn.convert` makes one of"):
            function(_model())


def test_bad_files(tmp_path):
    (tmp_path / "no.keras").write_bytes(b"nothing")
    theirs = _model()
    theirs.save_weights(tmp_path / "weights.h5")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / "new.keras")
    for name, config in (("empty", "{}"), ("torn", '{"class_name')):
        with (
            zipfile.ZipFile(tmp_path / "new.keras") as there,
            zipfile.ZipFile(tmp_path / f"{name}.keras", "w") as here,
        ):
            here.writestr("metadata.json", '{"keras_version": "2.15.0"}')
            here.writestr("config.json", config)
            here.writestr(
                "model.weights.h5", there.read("model.weights.h5")
            )
    multiplied = tf_keras.Sequential(
        [layers.Input((3,)), layers.BatchNormalization()]
    )
    multiplied = tf_keras.Model(
        multiplied.input, multiplied.output * multiplied.input
    )
    for source, message in (
        (tmp_path / "none.h5", "no such file"),
        (tmp_path / "no.keras", "neither, or damaged"),
        (tmp_path / "weights.h5", "needs a whole model"),
        (tmp_path / "empty.keras", "there is no model in it"),
        (tmp_path / "torn.keras", "its config.json cannot be read"),
        (multiplied, "cannot make a model of Keras 3"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            keras_bn.convert(source)
        assert "\n" not in str(error.value)

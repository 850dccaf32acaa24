"""What `export_saved_model` refuses before it writes anything."""

import os
import sys
import warnings

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.serving.export import _requests
from keras_bn.serving.interface import interface_of
from tests.keras_bn.serving import models
from tests.keras_bn.serving.models import CLASS_NAMES
from tests.keras_bn.serving.models import IMAGES


def _refused(directory, error, match, model, **kwargs):
    before = sorted(os.listdir(directory))
    with pytest.raises(error, match=match) as raised:
        keras_bn.export_saved_model(model, directory, **kwargs)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(directory)) == before


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


def test_models(tmp_path):
    called = _Subclassed()
    called(np.ones((2, 3), "float32"))
    for model, match in (
        (None, "of type builtins.NoneType"),
        (keras.layers.Dense(2), "takes a keras.Model"),
        (keras.Sequential([keras.layers.Dense(2)]), "a model that is built"),
        (called, r"export keras.Model\(inputs, model\(inputs\)\)"),
    ):
        _refused(tmp_path, ValueError, match, model)


def test_destinations(tmp_path):
    model = models.image_model()
    _refused(tmp_path, ValueError, "from 1 to", model, version=0)
    (tmp_path / "notes.txt").write_text("mine")
    _refused(tmp_path, ValueError, "something else", model)
    (tmp_path / "4").mkdir()
    _refused(tmp_path, ValueError, "published already", model, version=4)


def test_preprocessing(tmp_path):
    model = models.image_model()
    for preprocessing, match in (
        (3.0, "a pair"),
        ("raw", "a pair"),
        ((1.0,), "a pair"),
        ((1.0, [1.0, 2.0]), "the deviation must be a number, or one for each"),
        (([[1.0]], 1.0), "the mean must be a number, or one for each of 3"),
        ((np.nan, 1.0), "the mean must be finite"),
        ((0.0, 0.0), "the deviation above zero"),
        ((0.0, [1.0, -1.0, 1.0]), "the deviation above zero"),
        (keras.layers.Flatten(), "must give what the model takes"),
        (
            keras.Sequential(
                [keras.Input((8, 9, 3)), keras.layers.Rescaling(0.5)]
            ),
            "what the model takes",
        ),
    ):
        _refused(
            tmp_path, ValueError, match, model, preprocessing=preprocessing
        )
    inputs = [keras.Input((2,)), keras.Input((2,))]
    two = keras.Model(inputs, keras.layers.Add()(inputs))
    _refused(
        tmp_path, ValueError, "with one input", two, preprocessing=(0.0, 1.0)
    )


def test_class_names(tmp_path):
    model = models.image_model()
    for names, match in (
        ("cat", "a list of the classes' names"),
        ([], "a list of"),
        ([1, 2, 3], "a list of"),
        (["cat", "", "dog"], "a list of"),
        (["cat", "dog\n", "ship"], "text of one line each"),
        (["cat", "dog"], "a name for each of 3 outputs. Received: 2 names"),
    ):
        _refused(tmp_path, ValueError, match, model, class_names=names)
    dense = keras.layers.Dense
    vectors = keras.Sequential([keras.Input((5,)), dense(3)])
    maps = keras.Sequential([keras.Input((8, 8, 3)), dense(3)])
    anywhere = keras.Sequential(
        [keras.Input((None, 8, 3)), keras.layers.GlobalMaxPooling2D()]
    )
    for other, match in (
        (vectors, "needs a model of images"),
        (anywhere, "needs a model of images"),
        (maps, r"one output of shape \(batch, classes\)"),
        (models.image_model(dense(3, activation="sigmoid")), "in sigmoid"),
        (
            models.image_model(keras.layers.Lambda(lambda x: x)),
            "in a layer of unknown outputs",
        ),
        (models.image_model(models.Scale()), "in a layer of unknown outputs"),
    ):
        _refused(tmp_path, ValueError, match, other, class_names=CLASS_NAMES)


def test_what_ends_in_logits_and_what_in_probabilities():
    layers = keras.layers
    image = keras.Input((8, 8, 3))
    dense = layers.Dense(3)(layers.Flatten()(image))
    nested = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, activation="softmax")]
    )
    for output, activation in (
        (dense, "linear"),
        (layers.Dropout(0.5)(dense), "linear"),
        (keras_bn.BatchNormalization()(dense), "linear"),
        (layers.Softmax()(dense), "softmax"),
        (layers.Activation("softmax")(dense), "softmax"),
        (keras.ops.softmax(dense), "softmax"),
        (nested(dense), "softmax"),
        (keras.Sequential([nested, layers.Dense(3)])(dense), "linear"),
    ):
        interface = interface_of(keras.Model(image, output), None, CLASS_NAMES)
        assert interface.activation == activation


def test_batches(tmp_path):
    model = models.image_model()
    for name in ("verify_on", "warmup"):
        for batch, match in (
            ("images", "must hold numbers of shape"),
            (IMAGES[0], r"must hold numbers of shape \(samples, 8, 8, 3\)"),
            (IMAGES[..., :1], "must hold numbers"),
            (IMAGES[:0], "at least one sample"),
            ({"images": IMAGES}, r"the model's inputs \['inputs'\]"),
        ):
            _refused(
                tmp_path, ValueError, f"`{name}` .*{match}",
                model, **{name: batch},
            )  # fmt: skip
    inputs = [keras.Input((2,), name="a"), keras.Input((2,), name="b")]
    two = keras.Model(inputs, keras.layers.Add()(inputs))
    ones = np.ones((3, 2))
    for batch, match in (
        (ones, "a list or dictionary"),
        ([ones], "a list or dictionary"),
        ({"a": ones}, r"inputs \['a', 'b'\]"),
        ([ones, ones[:2]], "as many of each input"),
    ):
        _refused(tmp_path, ValueError, match, two, verify_on=batch)


def test_without_tensorflow(tmp_path, monkeypatch):
    model = models.image_model()
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    _refused(tmp_path, ImportError, "pip install tensorflow", model)


def test_without_tensorflow_servings_protos(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    with pytest.warns(UserWarning, match="give warmup=False"):
        assert _requests(None, [IMAGES]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _requests(False, [IMAGES]) is None
    with pytest.raises(ImportError, match="pip install tensorflow-serving-api"):
        _requests([IMAGES], [IMAGES])

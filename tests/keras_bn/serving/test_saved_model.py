"""What `export_saved_model` publishes, on the TensorFlow backend."""

import os
import resource
import shutil
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn.serving import export
from keras_bn.serving import served
from keras_bn.serving.errors import ExportError
from tests.keras_bn.serving import models
from tests.keras_bn.serving.models import CLASS_NAMES
from tests.keras_bn.serving.models import IMAGES


class Exported:
    """A model and its only version; loaded once, in this process."""

    def __init__(self, directory):
        keras.utils.set_random_seed(0)
        self.model = models.image_model()
        self.path = keras_bn.export_saved_model(
            self.model,
            directory,
            fold=False,
            preprocessing=(models.MEAN, models.DEVIATION),
            class_names=CLASS_NAMES,
            verify_on=IMAGES,
        )
        self._loaded = tf.saved_model.load(str(self.path))
        self.signatures = self._loaded.signatures

    def classify(self, *files):
        return self.signatures["classify_bytes"](
            image_bytes=tf.constant(files, tf.string)
        )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("models") / "digits")


_ALONE = """
import sys
sys.modules["keras"] = sys.modules["keras_bn"] = None
import numpy as np, tensorflow as tf
images = np.load(sys.argv[2])
signatures = tf.saved_model.load(sys.argv[1]).signatures
png = [tf.io.encode_png(image).numpy() for image in images]
found = {
    "float": signatures["serving_default"](inputs=np.float32(images)),
    "uint8": signatures["serving_uint8"](inputs=tf.constant(images)),
    "one": signatures["serving_default"](inputs=np.float32(images[:1])),
    "bytes": signatures["classify_bytes"](image_bytes=tf.constant(png)),
}
assert not any(name.partition(".")[0] == "keras_bn" and module
               for name, module in sys.modules.items())
np.savez(sys.argv[3], **{
    f"{call}_{key}": value.numpy().astype("S")
    if value.dtype == tf.string else value.numpy()
    for call, answer in found.items() for key, value in answer.items()
})
"""


def test_tensorflow_alone_answers_as_the_model(exported, tmp_path):
    # A server has it elsewhere.
    moved = shutil.copytree(exported.path, tmp_path / "elsewhere")
    np.save(tmp_path / "images.npy", IMAGES)
    arguments = [moved, tmp_path / "images.npy", tmp_path / "found.npz"]
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    subprocess.run(
        [sys.executable, "-c", _ALONE, *arguments], check=True, env=environment
    )
    found = np.load(tmp_path / "found.npz")
    logits = models.outputs(exported.model, IMAGES)
    assert np.std(logits, axis=0).min() > 0.05
    for name in ("float", "uint8"):
        np.testing.assert_allclose(found[f"{name}_outputs"], logits, 1e-5, 1e-5)
    np.testing.assert_allclose(found["one_outputs"], logits[:1], 1e-5, 1e-5)
    probabilities = models.softmax(logits)
    order = np.argsort(-probabilities, axis=-1)
    np.testing.assert_allclose(
        found["bytes_probabilities"],
        np.take_along_axis(probabilities, order, axis=-1),
        1e-4,
        1e-6,
    )
    names = np.char.decode(found["bytes_class_names"])
    np.testing.assert_array_equal(names, np.array(CLASS_NAMES)[order])
    assert len({tuple(row) for row in order}) > 1


def test_batch_normalization_is_folded_by_default(tmp_path):
    model = models.folding_model()
    found = export.export(
        model,
        tmp_path,
        preprocessing=(models.MEAN, models.DEVIATION),
        verify_on=IMAGES,
    )
    assert [one.how for one in found.fold_report] == [
        "into the layers before and after",
        "into the layer before",
        "multiply-add",
    ]
    loaded = tf.saved_model.load(str(found.path))
    variables = {x.name for x in loaded.weights}
    assert any("kernel" in name for name in variables)
    assert not any("moving" in name for name in variables)
    logits = models.outputs(model, IMAGES)
    for name, dtype in (("default", "float32"), ("uint8", "uint8")):
        answer = loaded.signatures[f"serving_{name}"](
            inputs=tf.constant(IMAGES.astype(dtype))
        )
        np.testing.assert_allclose(answer["outputs"], logits, 1e-4, 1e-4)
    for difference, allowed in found.differences.values():
        assert 0.0 < difference < allowed < 0.1


@pytest.mark.parametrize("fold", [False, True])
def test_an_empty_batch_is_an_error_that_says_so(fold, tmp_path):
    path = keras_bn.export_saved_model(
        models.folding_model(),
        tmp_path,
        fold=fold,
        warmup=False,
        class_names=CLASS_NAMES,
    )
    signatures = tf.saved_model.load(str(path)).signatures
    images = tf.zeros((0, 8, 8, 3))
    for name, inputs in (
        ("serving_default", {"inputs": images}),
        ("serving_uint8", {"inputs": tf.cast(images, tf.uint8)}),
        ("classify_bytes", {"image_bytes": tf.zeros(0, tf.string)}),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="an empty b"):
            signatures[name](**inputs)


def test_the_scaling_is_that_of_training_to_the_bit():
    """On TensorFlow's side; NumPy's is `experiments.data`'s."""
    made = export.preprocessing_model(
        (models.MEAN, models.DEVIATION), models.image_model()
    )
    found = tf.function(made)(tf.constant(np.float32(IMAGES)))
    np.testing.assert_array_equal(found, models.standardized(IMAGES))


def test_what_is_in_the_directory(exported):
    path = exported.path
    assert path.name == "1" and path.parent.name == "digits"
    labels = (path / "assets" / "labels.txt").read_text("utf-8")
    assert labels.splitlines() == CLASS_NAMES
    specs = {
        name: (
            function.structured_input_signature[1],
            function.structured_outputs,
        )
        for name, function in exported.signatures.items()
    }
    described = {
        name: [
            {
                key: (spec.shape.as_list(), spec.dtype.name)
                for key, spec in x.items()
            }
            for x in pair
        ]
        for name, pair in specs.items()
    }
    outputs = {"outputs": ([None, 3], "float32")}
    assert described == {
        "serving_default": [{"inputs": ([None, 8, 8, 3], "float32")}, outputs],
        "serving_uint8": [{"inputs": ([None, 8, 8, 3], "uint8")}, outputs],
        "classify_bytes": [
            {"image_bytes": ([None], "string")},
            {
                "class_names": ([None, 3], "string"),
                "probabilities": ([None, 3], "float32"),
            },
        ],
    }


def test_encoded_images(exported):
    image = IMAGES[0]
    jpeg = tf.io.encode_jpeg(image, quality=95)
    gray = tf.io.encode_png(image[..., :1])
    files = [tf.io.encode_png(image), jpeg, gray]
    found = exported.classify(*[file.numpy() for file in files])
    sent = np.stack(
        [
            image,
            tf.io.decode_jpeg(jpeg).numpy(),
            np.repeat(image[..., :1], 3, axis=-1),
        ]
    )
    wanted = models.softmax(models.outputs(exported.model, sent))
    np.testing.assert_allclose(
        found["probabilities"], -np.sort(-wanted, axis=-1), 1e-3, 1e-5
    )


def test_what_is_not_an_image(exported):
    png = tf.io.encode_png(IMAGES[0]).numpy()
    jpeg = tf.io.encode_jpeg(IMAGES[0]).numpy()
    large = tf.io.encode_png(np.zeros((9, 8, 3), "uint8")).numpy()
    for files, match in (
        ([b"no image"], r"Received: image_bytes\[0\], 8 bytes"),
        ([png, png, b""], r"Received: image_bytes\[2\], 0 bytes"),
        ([png, b"GIF89a" + png], r"Received: image_bytes\[1\]"),
        ([png[:8]], "PNG"),
        ([png[:40]], "PNG"),
        ([png[:-30]], "PNG"),
        ([jpeg[:20]], "JPEG"),
        ([b"\xff\xd8\xff"], "JPEG"),
        (
            [png, large],
            r"height 8 and width 8. Received: image_bytes\[1\] of height 9 ",
        ),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            exported.classify(*files)
    # It goes on.
    assert exported.classify(png)["probabilities"].shape == (1, 3)


def test_warm_up_requests(exported):
    from tensorflow_serving.apis import prediction_log_pb2

    path = exported.path / "assets.extra" / "tf_serving_warmup_requests"
    seen = []
    for record in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        assert request.model_spec.name == "digits"
        name = request.model_spec.signature_name
        inputs = {
            key: tf.make_ndarray(tensor)
            for key, tensor in request.inputs.items()
        }
        (size,) = {len(array) for array in inputs.values()}
        seen.append((name, size))
        answer = exported.signatures[name](
            **{key: tf.constant(array) for key, array in inputs.items()}
        )
        logits = models.outputs(exported.model, IMAGES[:size])
        if name == "classify_bytes":
            found, wanted = answer["probabilities"], models.softmax(logits)
            wanted = -np.sort(-wanted, axis=-1)
        else:
            found, wanted = answer["outputs"], logits
        np.testing.assert_allclose(found, wanted, 1e-4, 1e-5)
    assert sorted(seen) == sorted(
        (name, size) for name in exported.signatures for size in (1, 6)
    )


def test_one_answer_for_all_threads(exported):
    inputs = {"inputs": np.float32(IMAGES)}
    different, answer = served.answers_to_threads(exported.path, inputs)
    assert different == 1
    np.testing.assert_allclose(
        answer["outputs"], models.outputs(exported.model, IMAGES), 1e-5, 1e-5
    )


def test_latencies(exported):
    found = served.latencies(
        [exported.path] * 2, {"inputs": IMAGES}, sizes=(1, 9), repeats=5
    )
    assert len(found) == 2
    for one in found:
        assert set(one) == {1, 9}
        assert all(0.0 < x.p50 <= x.p99 < 60.0 for x in one.values())


@pytest.fixture
def published(exported, tmp_path):
    """A directory with one version, which stays as it is."""
    directory = tmp_path / "published"
    shutil.copytree(exported.path, directory / "1")

    def contents():
        return {
            path: path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }

    before = contents()
    yield directory
    assert os.listdir(directory) == ["1"]
    assert contents() == before


def test_a_wrong_export_is_not_published(exported, published, monkeypatch):
    def wrong(model):
        model = keras.models.clone_model(model)
        model.set_weights(
            [0.99 * weight for weight in exported.model.get_weights()]
        )
        return model

    monkeypatch.setattr(export, "_folded", wrong)
    with pytest.raises(ExportError, match="serving_default: outputs is off by"):
        keras_bn.export_saved_model(
            exported.model,
            published,
            warmup=False,
            verify_on=np.zeros((2, 8, 8, 3)),
        )


def test_a_full_disk(published):
    """The system stops writing in the middle of the variables."""
    model = models.image_model(filters=256)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ExportError, match="cannot be written: .*File too"):
            keras_bn.export_saved_model(
                model, published, fold=False, warmup=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "fold, error, match",
    [
        (False, ExportError, "outputs are not finite"),
        (True, ValueError, "with moving_variance not finite"),
    ],
)
def test_statistics_that_are_not_finite(fold, error, match, published):
    model = models.image_model()
    model.layers[1].moving_variance.assign(np.full(4, np.nan))
    weights = model.get_weights()
    with pytest.raises(error, match=match):
        keras_bn.export_saved_model(model, published, fold=fold, warmup=False)
    for found, before in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(found, before)


class NoConfig(keras.layers.Layer):
    def __init__(self, factor):
        super().__init__()
        self._factor = factor

    def call(self, inputs):
        return self._factor * inputs


def test_a_layer_that_cannot_be_cloned(published, tmp_path):
    """It cannot be folded around; without folding it is served as it is."""
    model = models.image_model(NoConfig(2.0))
    with pytest.raises(ValueError, match="`fold` cannot clone .* 'no_config'"):
        keras_bn.export_saved_model(model, published, warmup=False)
    path = keras_bn.export_saved_model(
        model, tmp_path / "not_folded", fold=False, warmup=False
    )
    function = tf.saved_model.load(str(path)).signatures["serving_default"]
    found = function(inputs=models.standardized(IMAGES))["outputs"]
    np.testing.assert_allclose(found, models.outputs(model, IMAGES), 1e-4, 1e-4)


def test_several_inputs_and_outputs(tmp_path):
    """Nested, in short floats, with names; the caller's model is not held."""
    inner = keras.Sequential(
        [
            keras.Input((3,)),
            keras_bn.BatchNormalization(),
            keras.layers.Dense(4, dtype="mixed_bfloat16"),
        ]
    )
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="a")
    z = keras.layers.Concatenate(dtype="float32")([inner(left), inner(right)])
    outputs = {"z": z, "code": inner(right)}
    model = keras.Model({"left": left, "a": right}, outputs)
    path = keras_bn.export_saved_model(
        model, tmp_path, fold=False, warmup=False
    )
    function = tf.saved_model.load(str(path)).signatures["serving_default"]
    assert {k: v.dtype for k, v in function.structured_outputs.items()} == {
        "z": tf.float32,
        "code": tf.float32,
    }
    ones, twos = np.ones((2, 3), "float32"), np.full((2, 3), 2.0, "float32")
    wanted = model({"left": ones, "a": twos})
    found = function(left=tf.constant(ones), a=tf.constant(twos))
    for name, output in wanted.items():
        np.testing.assert_allclose(
            found[name], tf.cast(output, "float32"), 1e-2, 1e-2
        )
    # No function that will run again has traced the layer.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_bn.freeze(model)


def test_keras_layers_as_preprocessing(tmp_path):
    """Any layer or model; and a softmax is not taken twice."""
    model = models.image_model(keras.layers.Softmax())
    path = keras_bn.export_saved_model(
        model,
        tmp_path,
        fold=False,
        preprocessing=keras.Sequential(
            [
                keras.Input((4, 4, 3)),
                keras.layers.UpSampling2D(2),
                keras.layers.Rescaling(1 / 127.5, -1.0),
            ]
        ),
        class_names=tuple(CLASS_NAMES),
        warmup=IMAGES[:, :4, :4],
    )
    signatures = tf.saved_model.load(str(path)).signatures
    images = IMAGES[:, :4, :4]
    scaled = np.repeat(np.repeat(images / 127.5 - 1.0, 2, axis=1), 2, axis=2)
    wanted = model(np.float32(scaled)).numpy()
    found = signatures["serving_uint8"](inputs=tf.constant(images))["outputs"]
    np.testing.assert_allclose(found, wanted, 1e-4, 1e-6)
    png = [tf.io.encode_png(image).numpy() for image in images]
    found = signatures["classify_bytes"](image_bytes=tf.constant(png))
    np.testing.assert_allclose(
        found["probabilities"], -np.sort(-wanted, axis=-1), 1e-4, 1e-6
    )

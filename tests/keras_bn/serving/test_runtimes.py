"""Other programs read what is exported: the page docs/serving.md is run."""

import base64
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from tests.keras_bn.serving import models
from tests.keras_bn.serving.models import CLASS_NAMES
from tests.keras_bn.serving.models import IMAGES

_PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8")


def _blocks(heading, language):
    """The code of one kind in a section of the page."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", _PAGE, re.DOTALL | re.MULTILINE
    )
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with `models/animals/1`, and the logits of the images."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("served")
    model = models.folding_model()
    keras_bn.export_saved_model(
        model,
        folder / "models" / "animals",
        preprocessing=(models.MEAN, models.DEVIATION),
        class_names=CLASS_NAMES,
        verify_on=IMAGES,
    )
    np.save(folder / "images.npy", IMAGES.astype("float32"))
    cat = tf.io.encode_png(IMAGES[0]).numpy()
    (folder / "cat.png").write_bytes(cat)
    return folder, models.outputs(model, IMAGES)


def _run_section(heading, folder):
    """Runs a section's commands, then each of its programs on its own."""
    for block in _blocks(heading, "sh"):
        program, *arguments = shlex.split(block)
        assert program == "python"
        subprocess.run([sys.executable, *arguments], check=True, cwd=folder)
    for block in _blocks(heading, "python"):
        code = (
            "import sys\n"
            'sys.modules["keras"] = sys.modules["keras_bn"] = None\n'
            "import numpy as np\n"
            'images = np.load("images.npy")\n'
            f"{block}\n"
            'np.save("outputs.npy", globals().get("outputs", []))\n'
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    return np.load(folder / "outputs.npy")


@pytest.mark.parametrize(
    "heading", ["TensorFlow", "OpenVINO", "ONNX Runtime", "LiteRT"]
)
def test_a_runtime_answers_as_the_model(heading, served):
    folder, logits = served
    found = _run_section(heading, folder)
    np.testing.assert_allclose(found, logits, 1e-4, 1e-4)


def test_the_servers_configuration():
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    (block,) = _blocks("TensorFlow Serving", "proto")
    parsed = text_format.Parse(
        block, model_server_config_pb2.ModelServerConfig()
    )
    (config,) = parsed.model_config_list.config
    assert (config.name, config.model_platform) == ("animals", "tensorflow")
    (command,) = _blocks("TensorFlow Serving", "sh")
    assert f"--model_config_file={Path(config.base_path).parent}" in command
    for port in re.findall(r"localhost:(\d+)", _PAGE):
        assert f"-p {port}:{port}" in command


@pytest.fixture
def requests(served, monkeypatch):
    """What the page's two programs build; and the signatures."""
    folder, logits = served
    monkeypatch.chdir(folder)
    built = []
    for block in _blocks("TensorFlow Serving", "python"):
        names = {}
        exec(block, names)
        built.append(names["request"])
    loaded = tf.saved_model.load("models/animals/1")
    return *built, loaded.signatures, models.softmax(logits)


def _check(answer, probabilities):
    best = np.argmax(probabilities[0])
    assert answer["class_names"].numpy()[0, 0].decode() == CLASS_NAMES[best]
    np.testing.assert_allclose(
        answer["probabilities"][0, 0], probabilities[0, best], 1e-4
    )


def test_the_request_by_rest(requests):
    """Read as TensorFlow Serving's REST API describes it."""
    request, _, signatures, probabilities = requests
    assert request.get_method() == "POST"
    assert request.full_url.endswith("/v1/models/animals:predict")
    body = json.loads(request.data)
    inputs = {
        name: tf.constant(
            [
                base64.b64decode(instance[name]["b64"])
                for instance in body["instances"]
            ]
        )
        for name in body["instances"][0]
    }
    _check(signatures[body["signature_name"]](**inputs), probabilities)


def test_the_request_by_grpc(requests):
    _, request, signatures, probabilities = requests
    assert request.model_spec.name == "animals"
    function = signatures[request.model_spec.signature_name]
    inputs = {
        name: tf.constant(tf.make_ndarray(tensor))
        for name, tensor in request.inputs.items()
    }
    _, specs = function.structured_input_signature
    for name, tensor in inputs.items():
        assert specs[name].is_compatible_with(tensor)
    _check(function(**inputs), probabilities)

"""Exports from JAX and PyTorch, in processes that run Keras on them."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_bn.serving import rebuild
from tests.keras_bn.serving import models

_EXPORT = """
import os, sys
import keras, numpy as np
import keras_bn
from keras_bn.serving import child_process
from keras_bn.serving.errors import ExportError
from tests.keras_bn.serving import models

directory, found, hostile = sys.argv[1:]
sys.path.append("")
from own_layers import Doubled
os.chdir(hostile)
os.environ["PYTHONPATH"] = os.pathsep.join(["", ".", os.environ["PYTHONPATH"]])
run = child_process.run

def in_an_interactive_session(*arguments):
    sys.path.insert(0, "")
    run(*arguments)
    sys.path.pop(0)

child_process.run = in_an_interactive_session
keras.utils.set_random_seed(1)
model = models.image_model(Doubled())
weights = model.get_weights()
path = keras_bn.export_saved_model(
    model, directory, fold=False, warmup=models.IMAGES[:2],
    preprocessing=(models.MEAN, models.DEVIATION), verify_on=models.IMAGES,
)
assert path.name == "1", path
for before, after in zip(weights, model.get_weights(), strict=True):
    np.testing.assert_array_equal(after, before)
np.save(found, models.outputs(model, models.IMAGES))

@keras.saving.register_keras_serializable(package="tests")
class OnlyHere(keras.layers.Layer):
    def call(self, inputs):
        return inputs + 1.0

unknown = keras.Sequential([keras.Input((3,)), OnlyHere()])
try:
    keras_bn.export_saved_model(unknown, directory, warmup=False)
except ExportError as error:
    print(error)
assert os.listdir(directory) == ["1"]
"""

_OWN_LAYERS = """
import keras

@keras.saving.register_keras_serializable(package="tests")
class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return 2.0 * inputs
"""
# What Python, or a child of this package, imports by these names.
_HOSTILE = (
    "json keras keras_bn keras_bn_checks numpy own_layers runpy sitecustomize "
    "tensorflow usercustomize"
).split()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_export(backend, tmp_path):
    directory, outputs = tmp_path / "model", tmp_path / "outputs.npy"
    own, hostile = tmp_path / "own", tmp_path / "hostile"
    own.mkdir()
    hostile.mkdir()
    (own / "own_layers.py").write_text(_OWN_LAYERS)
    ran = tmp_path / "ran"
    for name in _HOSTILE:
        (hostile / f"{name}.py").write_text(
            f"open({str(ran)!r}, 'a').write({name!r})\nraise SystemExit\n"
        )
    child = subprocess.run(
        [sys.executable, "-P", "-c", _EXPORT, directory, outputs, hostile],
        env=os.environ
        | {
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        cwd=own,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert not ran.exists(), ran.read_text()
    loaded = tf.saved_model.load(str(directory / "1"))
    for name, dtype in (("default", "float32"), ("uint8", "uint8")):
        answer = loaded.signatures[f"serving_{name}"](
            inputs=tf.constant(models.IMAGES.astype(dtype))
        )
        np.testing.assert_allclose(
            answer["outputs"], np.load(outputs), 1e-4, 1e-5
        )
    assert (directory / "1" / "assets.extra").is_dir()
    (message,) = child.stdout.splitlines()
    assert message.startswith("Rebuilding the model on TensorFlow, ")
    assert "OnlyHere" in message
    assert message.endswith("Nothing was published.")


def test_a_file_that_was_changed_is_not_loaded(tmp_path, monkeypatch):
    """It may hold code."""
    (tmp_path / "model.keras").write_bytes(b"ours")
    digest = rebuild._digest(tmp_path, "model.keras")
    request = {"files": str(tmp_path), "digests": {"model.keras": digest}}
    (tmp_path / "model.keras").write_bytes(b"theirs")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request)))
    with pytest.raises(ValueError, match="model.keras was changed by another"):
        rebuild.main()

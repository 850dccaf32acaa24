"""Exports from JAX and PyTorch, in processes that run Keras on them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.keras_bn.serving import models

_EXPORT = """
import os, sys
import keras, numpy as np
import keras_bn
from keras_bn.serving.errors import ExportError
from tests.keras_bn.serving import models

directory, found = sys.argv[1:]
keras.utils.set_random_seed(1)
model = models.image_model(models.Scale())
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


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_export(backend, tmp_path):
    directory, outputs = tmp_path / "model", tmp_path / "outputs.npy"
    child = subprocess.run(
        [sys.executable, "-c", _EXPORT, directory, outputs],
        env=os.environ
        | {
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
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

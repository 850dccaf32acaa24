"""What the import of the package needs, and says where that is missing."""

import io
import json
import os
import subprocess
import sys
import zipfile

import keras
import pytest

from keras_bn import backends
from tests import without_posix

BACKEND = keras.backend.backend()
OTHERS = [x for x in backends.SUPPORTED if x != BACKEND]
# Without it the backend is there and its import fails.
_PART = {
    "tensorflow": "google.protobuf",
    "jax": "jaxlib",
    "torch": "torch._C",
}[BACKEND]


def test_where_posix_is_not(tmp_path):
    """All modules are imported there, and a model is exported."""
    # This one is a program, which makes Keras impossible to import.
    left_out = ["keras_bn.serving.tensorflow_alone"]
    left_out += [f"keras_bn.kernels.{x}" for x in OTHERS]
    left_out += [f"keras_bn.{x}_module" for x in OTHERS]
    with_tensorflow = backends.is_installed("tensorflow")
    if not with_tensorflow:
        left_out += ["keras_bn.serving.saved_model", "keras_bn.serving.warmup"]
    printed = without_posix.run(
        """
        import os, sys
        import keras_bn_command

        directory, export, *left_out = sys.argv[1:]
        found = without_posix.walk("keras_bn", left_out)
        assert "keras_bn.serving.publishing" in found
        if export == "True":
            import keras, keras_bn

            layers = [keras.Input((3,)), keras_bn.BatchNormalization()]
            model = keras.Sequential(layers)
            keras_bn.export_saved_model(model, directory, warmup=False)
            assert os.listdir(directory) == ["1"]
        print("done")
        """,
        tmp_path / "model",
        with_tensorflow,
        *left_out,
    )
    assert printed.endswith("done\n"), printed


_HIDING = """
import sys
import traceback

hidden = sys.argv[1].split()

class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hiding())
try:
    import keras_bn
except ImportError as error:
    print(error)
    print(len(traceback.extract_tb(error.__traceback__)))
    print(error.__cause__ is None)
    print(error.__context__ is None or error.__suppress_context__)
import keras_bn_command
sys.exit(keras_bn_command.main(["audit", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    "chosen, hidden, said",
    [
        (
            BACKEND,
            backends.SUPPORTED,
            f"Keras runs on {BACKEND} (by KERAS_BACKEND), which is not "
            f'installed. Run `pip install "keras-bn[{BACKEND}]"`, or with '
            f"[{OTHERS[0]}] or [{OTHERS[1]}] and set KERAS_BACKEND to that.",
        ),
        (
            OTHERS[0],
            OTHERS,
            f"Keras runs on {OTHERS[0]} (by KERAS_BACKEND), which is not "
            f'installed. Run `pip install "keras-bn[{OTHERS[0]}]"`, or set '
            f"KERAS_BACKEND to {BACKEND}.",
        ),
        ("theano", OTHERS, "Received: 'theano' (by KERAS_BACKEND). Set "),
        (
            "numpy",
            backends.SUPPORTED,
            "Received: 'numpy' (by KERAS_BACKEND). Set KERAS_BACKEND to one of",
        ),
        (
            BACKEND,
            [_PART],
            f"Keras runs on {BACKEND} (by KERAS_BACKEND), which is installed "
            "but cannot be imported: ",
        ),
        ("", OTHERS[:1], "keras.json), which is not installed. Run `pip"),
        (BACKEND, ["keras"], "keras_bn needs Keras 3 and a backend. Run `pip"),
    ],
    ids=["none", "another", "unknown", "numpy", "broken", "file", "keras"],
)
def test_a_missing_backend_is_one_sentence(chosen, hidden, said, tmp_path):
    settings = {"backend": OTHERS[0], "floatx": "float32"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    (tmp_path / "model.keras").write_bytes(_archive())
    done = subprocess.run(
        [
            *(sys.executable, "-c", _HIDING, " ".join(hidden)),
            tmp_path / "model.keras",
        ],
        env=os.environ
        | {
            "KERAS_BACKEND": chosen,
            "KERAS_HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    sentence, frames, *alone = done.stdout.splitlines()
    assert said in sentence
    if _PART in hidden:
        # What is wrong with it is not hidden.
        assert alone == ["False", "True"]
        assert _PART.partition(".")[0] in sentence
    else:
        assert alone == ["True", "True"] and int(frames) <= 8
    line = done.stderr.splitlines()[-1]
    assert line == f"keras-bn: error: {sentence.rstrip('.')}"
    assert "Traceback" not in done.stderr


def _archive():
    """A file that the command takes for a model's until it loads it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("config.json", "{}")
    return content.getvalue()

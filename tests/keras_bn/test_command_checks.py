"""What the command finds wrong before it imports Keras."""

import json
import os
import subprocess
import sys
import tracemalloc
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
import keras_bn_checks
import keras_bn_command
from keras_bn.backends import is_installed
from keras_bn.diagnostics.text_table import text_table
from keras_bn.serving.interface import interface_of
from keras_bn.surgery.tf_keras_models import is_tf_keras_file


def _classifier():
    return keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Flatten(),
            layers.Dense(3),
            keras_bn.BatchNormalization(),
            layers.Softmax(),
        ]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    _classifier().save(folder / "model.keras")
    (folder / "cut.keras").write_bytes(
        (folder / "model.keras").read_bytes()[:999]
    )
    (folder / "file.txt").write_text("mine")
    (folder / "text.keras").write_text("mine")
    (folder / "text.h5").write_text("mine")
    (folder / "text.npz").write_text("mine")
    (folder / "none").mkdir()
    (folder / "folder.keras").mkdir()
    (folder / "two.txt").write_text("cat\ndog\n")
    (folder / "three.txt").write_text("cat\ndog\nship\n")
    (folder / "cut.txt").write_text("cat\ndog\u2028ship\nbird\n")
    os.mkfifo(folder / "pipe")
    np.savez(folder / "data.npz", x=np.zeros((4, 4, 4, 3)))
    for name, document in (("config", "[" * 10**5), ("deep", "{}")):
        with zipfile.ZipFile(folder / f"{name}.keras", "w") as file:
            file.writestr("config.json", document)
    _bomb(folder / "bomb.keras", "config.json")
    return folder


def _bomb(path, member):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("config.json", "metadata.json"):
            size = 2 * keras_bn_checks.LARGEST_TEXT if name == member else 0
            file.writestr(name, b"{" + b" " * size + b"}")


_EXPORT = ["export", "model.keras", "--output"]
_AUDIT = ["audit", "model.keras"]
_REFUSED = [
    (["audit", "none.keras"], "no such file"),
    (["audit", "none"], "no such file"),
    (["audit", "file.txt"], "must be a .keras file"),
    (["audit", "text.keras"], "damaged"),
    (["audit", "cut.keras"], "damaged"),
    (["audit", "config.keras"], "damaged"),
    (["fold", "bomb.keras", "--output=new.keras"], "larger than 32 MiB"),
    (["convert", "text.h5", "--output=new.keras"], "no .h5 file"),
    ([*_AUDIT, "--steps=0"], "--steps=0"),
    ([*_AUDIT, "--data=text.npz"], "the file of arrays cannot be read"),
    ([*_AUDIT, "--data=new.npz"], "no such file"),
    ([*_AUDIT, "--data=none"], "holds no images"),
    ([*_AUDIT, "--data=pipe"], "There is no such folder"),
    ([*_AUDIT, "--data=./new"], "There is no such folder"),
    ([*_AUDIT, "--data=data.npz", "--labels=new.npy"], "--labels=new.npy"),
    ([*_AUDIT, "--data=none", "--labels=new.npy"], "Leave it out"),
    (["fold", "model.keras", "--output=new.h5"], "must end in .keras"),
    (["fold", "model.keras", "--output=new/new.keras"], "that exists"),
    (["fold", "model.keras", "--output=/proc/new.keras"], "cannot write"),
    (["fold", "model.keras", "--output=model.keras"], "there already"),
    (
        ["recalibrate", "model.keras", "--data=data.npz"]
        + ["--output=folder.keras"],
        "there already",
    ),
    ([*_EXPORT, "/proc/x"], "Received: --output=/proc/x. Name a place in a f"),
    ([*_EXPORT, "file.txt"], "a file"),
    ([*_EXPORT, "file.txt/new"], "file.txt (Not a directory)"),
    ([*_EXPORT, "."], "something else than numbered versions"),
    ([*_EXPORT, "new", "--mean=1"], "go together"),
    ([*_EXPORT, "new", "--mean=1", "--deviation=1,0"], "above zero"),
    ([*_EXPORT, "new", "--mean=nan", "--deviation=1"], "must be finite"),
    ([*_EXPORT, "new", "--class_names=new.txt"], "no such file"),
    ([*_EXPORT, "new", "--class_names=pipe"], "not a file"),
    ([*_EXPORT, "new", "--class_names=cut.txt"], "in line 2 of cut.txt"),
    (
        [*_EXPORT, "new", "--class_names=two.txt"],
        "a name for each of 3 outputs of the model. Received: 2 names",
    ),
    ([*_EXPORT, "new", "--class_names=three.txt", "--data=none"], "no images"),
]
_COMMANDS = """
import contextlib, io, json, sys
import keras_bn_command

answers = []
for arguments in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = keras_bn_command.main(arguments)
    imported = {"keras", "numpy", "tensorflow", "jax", "torch", "h5py"}
    imported &= set(sys.modules)
    answers.append([code, error.getvalue(), sorted(imported)])
print(json.dumps(answers))
"""


def test_what_needs_no_keras(files):
    before = sorted(files.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps([x for x, _ in _REFUSED])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=files,
        stdout=subprocess.PIPE,
        check=True,
    )
    for (arguments, said), (code, error, imported) in zip(
        _REFUSED, json.loads(done.stdout), strict=True
    ):
        assert code == 2 and not imported, arguments
        assert error.startswith("keras-bn: error: ") and said in error, error
        assert error.count("\n") == 1
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    "backend, arguments",
    [
        (keras.backend.backend(), ["audit", "model.keras", "--data=data.npz"]),
        # Keras imports TensorFlow there too, where it is installed.
        ("jax", ["fold", "model.keras", "--output"]),
    ],
    ids=["this backend", "jax"],
)
def test_no_line_of_a_framework_comes_first(
    backend, arguments, files, tmp_path
):
    if not is_installed(backend):
        pytest.skip(f"{backend} is not installed")
    if arguments[-1] == "--output":
        arguments = [*arguments, str(tmp_path / "new.keras")]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    program = "import keras_bn_command, sys; sys.exit(keras_bn_command.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        cwd=files,
        capture_output=True,
        text=True,
    )
    assert done.returncode < 2 and done.stdout
    assert done.stderr == ""


@keras.saving.register_keras_serializable(package="tests")
class Dense(layers.Dense):
    """Has another number of outputs than its config's `units`."""

    def call(self, inputs):
        outputs = super().call(inputs)
        return keras.ops.concatenate([outputs, outputs], axis=-1)

    def compute_output_shape(self, input_shape):
        return *input_shape[:-1], 2 * self.units


def test_number_of_outputs(tmp_path):
    inputs = keras.Input((4,))
    hidden = layers.Dense(5)(inputs)
    nested = keras.Sequential([keras.Input((5,)), layers.Dense(6)])
    normalized = layers.BatchNormalization()(layers.Dense(7)(hidden))
    for outputs, known in (
        (hidden, True),
        (layers.Dropout(0.1)(layers.Softmax()(normalized)), True),
        (nested(hidden), True),
        (layers.ReLU()(nested(hidden)), True),
        ([hidden, normalized], False),
        (layers.Concatenate()([hidden, normalized]), False),
        (Dense(2)(hidden), False),
        (layers.RepeatVector(2)(hidden), False),
    ):
        for model in (
            keras.Model(inputs, outputs),
            keras.Sequential([keras.Input((4,)), keras.Model(inputs, outputs)]),
        ):
            model.save(tmp_path / "model.keras")
            config = keras_bn_checks.json_member(
                tmp_path / "model.keras", "config.json"
            )
            found = keras_bn_checks.number_of_outputs(config)
            assert found == (outputs.shape[-1] if known else None)
            if not known:
                break
    for config in ({}, [], None, {"class_name": "Dense", "config": {}}):
        assert keras_bn_checks.number_of_outputs(config) is None


def test_a_document_that_would_fill_the_memory(tmp_path):
    bound = 4 * keras_bn_checks.LARGEST_TEXT
    _bomb(tmp_path / "config.keras", "config.json")
    _bomb(tmp_path / "metadata.keras", "metadata.json")
    # An archive may give any size.
    content = (tmp_path / "config.keras").read_bytes()
    size = (2 * keras_bn_checks.LARGEST_TEXT + 2).to_bytes(4, "little")
    assert content.count(size) == 2
    (tmp_path / "lie.keras").write_bytes(content.replace(size, b"\2\0\0\0"))
    tracemalloc.start()
    try:
        for name in ("config", "lie"):
            with pytest.raises(ValueError, match="larger|damaged") as error:
                keras_bn.convert(tmp_path / f"{name}.keras")
            assert str(tmp_path / f"{name}.keras") in str(error.value)
        assert not is_tf_keras_file(tmp_path / "metadata.keras")
        assert tracemalloc.get_traced_memory()[1] < bound
    finally:
        tracemalloc.stop()


def test_arrays_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", b"0" * 10**6)
    keras_bn_checks.check_data(str(path), None)
    content = path.read_bytes()
    size = (10**6).to_bytes(4, "little")
    # More than 4 GiB need fields of 8 bytes, which `zipfile` makes of these.
    path.write_bytes(content.replace(size, (2**32 - 2).to_bytes(4, "little")))
    keras_bn_checks._LARGEST_MEMBER, kept = 2**31, 2**32
    try:
        with pytest.raises(ValueError, match="x.npy would take 4.0 GiB"):
            keras_bn_checks.check_data(str(path), None)
    finally:
        keras_bn_checks._LARGEST_MEMBER = kept


@pytest.mark.parametrize(
    "content, names",
    [
        (b"cat\ndog", ["cat", "dog"]),
        (b"cat\r\ndog\r\n", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\n", ["cat"]),
        ("kissa, ä\nقط\n猫\n👩‍🚀\n".encode(), ["kissa, ä", "قط", "猫", "👩‍🚀"]),
        (b" cat \n", [" cat "]),
    ],
)
def test_class_names(content, names, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    assert keras_bn_checks.class_names(tmp_path / "names.txt") == names


_CONTROLS = (
    "\0 \t \v \f \r \x1b \x1c \x1d \x1e \x7f \x85 \x9b \u061c \u200e \u200f "
    "\u2028 \u2029 \u202a \u202e \u2066 \u2069"
).split(" ")


@pytest.mark.parametrize("control", _CONTROLS, ids=ascii)
def test_control_characters_in_class_names(control, tmp_path):
    name = f"d{control}og"
    path = tmp_path / "names.txt"
    path.write_bytes(f"cat\n{name}\n".encode())
    with pytest.raises(ValueError) as error:
        keras_bn_checks.class_names(path)
    assert f"Received: {name!r} in line 2" in str(error.value)
    assert str(error.value).isprintable()
    with pytest.raises(ValueError, match="without control") as error:
        interface_of(_classifier(), None, ["cat", name, "ship"])
    assert str(error.value).isprintable()
    assert keras_bn_checks.printable(name).isprintable()
    assert text_table([name], [["a\nb"]]).count("\n") == 2


def test_files_of_class_names_that_are_none(tmp_path):
    path = tmp_path / "names.txt"
    for content, said in (
        (b"", "is empty"),
        (b"cat\n\ndog\n", "Received: '' in line 2"),
        (b"cat\n\n", "Received: '' in line 2"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"a" * (keras_bn_checks.LARGEST_TEXT + 1), "larger than 32 MiB"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            keras_bn_checks.class_names(path)


def test_names_of_a_file_reach_no_terminal(tmp_path, capsys, monkeypatch):
    """What a terminal does with them is up to whoever made the file."""
    monkeypatch.chdir(tmp_path)
    name = "bn\x1b[2J\u202e\x9b"
    layer = keras_bn.BatchNormalization(name=name)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), layer])
    layer.moving_variance.assign([1.0, -1.0, 1.0, 1.0])
    model.save("model.keras")
    np.savez("data.npz", x=np.ones((8, 4), "float32"))
    printed = ""
    for arguments in (
        ["audit", "model.keras"],
        ["fold", "model.keras", "--output=new.keras"],
        ["recalibrate", "model.keras", "--data=data.npz", "--output=2.keras"],
    ):
        keras_bn_command.main(arguments)
        printed += "".join(capsys.readouterr())
    assert "bn\\x1b[2J" in printed
    assert not any(
        keras_bn_checks.is_control(x) for x in printed.replace("\n", "")
    )


def test_names_of_outputs_reach_no_client():
    inputs = keras.Input((4,))
    outputs = {"a\x1b": layers.Dense(1)(inputs), "b": layers.Dense(1)(inputs)}
    with pytest.raises(ValueError) as error:
        interface_of(keras.Model(inputs, outputs))
    assert "Received: 'a\\x1b'." in str(error.value)

"""Every command, on files that are broken in every way: 2, and one line.

Exit code 1 means that `audit` found something.
"""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib

import keras
import numpy as np
import pytest

import keras_bn_command
from keras_bn import cli

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 255, (8, 6, 6, 3)).astype("float32")
CLASSES = np.arange(8) % 2
# A line, a colour, a character from right to left, and none at all.
ODD = "a\nb\x1b[31m\u202e\udcff"

COMMANDS = {
    "audit": [],
    "recalibrate": ["--data=data.npz", "--output=new.keras"],
    "convert": ["--output=new.keras"],
    "fold": ["--output=new.keras"],
    "export": ["--output=new"],
}


def _model():
    return keras.Sequential(
        [
            keras.Input((6, 6, 3), name="images"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def _rewritten(path, whole, **members):
    """A copy of an archive with other members; None: without that one."""
    with zipfile.ZipFile(io.BytesIO(whole)) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    contents |= {name.replace("__", "."): x for name, x in members.items()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in contents.items():
            if content is not None:
                new.writestr(name, content)


def _chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def _png(width, height):
    """The header of a PNG file, which is all that is read first."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    return start + _chunk(b"IDAT", zlib.compress(b"\0" * 9))


def _write_models(folder):
    _model().save(folder / "good.keras")
    whole = (folder / "good.keras").read_bytes()
    with zipfile.ZipFile(folder / "good.keras") as archive:
        config = archive.read("config.json").decode()
    other = json.loads(config)
    other["class_name"], other["module"] = "Nowhere", "no.such.module"
    for name, members in {
        "no_config": {"config__json": None},
        "empty_config": {"config__json": ""},
        "text_config": {"config__json": "not JSON"},
        "bytes_config": {"config__json": b"\xff\xfe\0"},
        "list_config": {"config__json": "[]"},
        "number_config": {"config__json": "3"},
        "dict_config": {"config__json": "{}"},
        "deep_config": {"config__json": "[" * 100_000},
        "cut_config": {"config__json": config[: len(config) // 2]},
        "unknown_class": {"config__json": json.dumps(other)},
        "unknown_layer": {
            "config__json": config.replace('"Flatten"', '"Flatter"')
        },
        "no_metadata": {"config__json": None, "metadata__json": None},
        "no_weights": {"model__weights__h5": None},
        "cut_weights": {"model__weights__h5": b"\x89HDF\r\n\x1a\nnothing"},
        "text_weights": {"model__weights__h5": "weights"},
    }.items():
        _rewritten(folder / f"{name}.keras", whole, **members)
    for name, content in {
        "empty.keras": b"",
        "text.keras": b"a model",
        "cut.keras": whole[: len(whole) // 2],
        "end_alone.keras": whole[-200:],
        "empty.h5": b"",
        "text.h5": b"a model",
        "cut.h5": b"\x89HDF\r\n\x1a\n" + bytes(99),
        f"{ODD}.keras": b"a model",
        "model.csv": b"1,2\n",
    }.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 2] = bytes(
        len(whole) // 2 - len(whole) // 3
    )
    (folder / "damaged.keras").write_bytes(damaged)
    (folder / "folder.keras").mkdir()
    os.mkfifo(folder / "pipe.keras")
    (folder / "loop.keras").symlink_to("loop.keras")


MODELS = [
    *("no_config", "empty_config", "text_config", "bytes_config"),
    *("list_config", "number_config", "dict_config", "deep_config"),
    *("cut_config", "unknown_class", "unknown_layer", "no_metadata"),
    *("no_weights", "cut_weights", "text_weights", "empty", "text", "cut"),
    *("end_alone", "damaged", "folder", "pipe", "loop", "missing", ODD),
]
MODELS = [f"{name}.keras" for name in MODELS]
MODELS += ["empty.h5", "text.h5", "cut.h5", "model.csv", "", "a\0b.keras"]


def _write_data(folder):
    np.savez(folder / "data.npz", x=IMAGES, y=CLASSES)
    whole = (folder / "data.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.npz").write_bytes(b"arrays")
    np.savez(folder / "none.npz")
    np.savez(folder / "objects.npz", x=np.array([{}, None], object))
    np.savez(folder / "strings.npz", x=np.array(["a", "b"]))
    np.savez(folder / "dates.npz", x=np.zeros((8, 6, 6, 3), "datetime64[s]"))
    np.savez(folder / "complex.npz", x=IMAGES.astype("complex64") + 1j)
    np.savez(folder / "other_names.npz", a=IMAGES)
    np.savez(folder / "labels_alone.npz", y=CLASSES)
    np.savez(folder / "number.npz", x=3.0)
    np.savez(folder / "no_samples.npz", x=IMAGES[:0])
    np.savez(folder / "wide.npz", x=IMAGES[..., :2])
    np.savez(folder / "flat.npz", x=IMAGES.reshape(8, -1))
    np.savez(folder / "nan.npz", x=IMAGES * np.nan)
    np.savez(folder / "infinite.npz", images=IMAGES * np.inf)
    (folder / "data.csv").write_text("1,2\n")
    np.save(folder / "array.npy", IMAGES)
    image = np.clip(IMAGES[0], 0, 255).astype("uint8")
    for name, content in {
        "text": b"an image",
        "zero": b"",
        "header": _png(6, 6),
        # Above Pillow's limit, and above twice that, where it raises.
        "large": _png(30_000, 30_000),
    }.items():
        (folder / name).mkdir()
        keras.utils.save_img(folder / name / "a.png", image, scale=False)
        (folder / name / "b.png").write_bytes(content)
    (folder / "named" / "image.png").mkdir(parents=True)
    (folder / "named" / "dangling.jpg").symlink_to("nowhere")
    (folder / "nothing").mkdir()


DATA = [
    *("cut.npz", "empty.npz", "text.npz", "none.npz", "objects.npz"),
    *("strings.npz", "dates.npz", "complex.npz", "other_names.npz"),
    *("labels_alone.npz", "number.npz", "no_samples.npz", "wide.npz"),
    *("flat.npz", "nan.npz", "infinite.npz", "data.csv", "array.npy"),
    *("text", "zero", "header", "large", "named", "nothing", "missing.npz"),
    *("./missing", "no_such_dataset", "mnist:no:such", "", ODD, "a\0b.npz"),
    *("good.keras", "/proc/self/mem"),
]


def _write_labels(folder):
    np.savez(folder / "unlabelled.npz", x=IMAGES)
    np.save(folder / "few.npy", CLASSES[:3])
    np.save(folder / "floats.npy", np.float32(IMAGES[:, 0, 0]))
    np.save(folder / "objects.npy", np.array([None] * 8, object))
    np.save(folder / "strings.npy", np.array(["cat"] * 8))
    np.save(folder / "number.npy", 3)
    np.save(folder / "nan.npy", CLASSES * np.nan)
    (folder / "text.npy").write_text("0\n1\n")


LABELS = [
    *("few.npy", "floats.npy", "objects.npy", "strings.npy", "number.npy"),
    *("nan.npy", "text.npy", "missing.npy", "data.npz", "nothing"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    _write_models(folder)
    _write_data(folder)
    _write_labels(folder)
    return folder


def _content(folder):
    """Paths, sizes and times of all that lies there."""
    return {
        path: (one.st_size, one.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for one in [path.lstat()]
        if not path.is_dir()
    }


# What was expected has a sentence, and no name of an exception.
_UNEXPECTED = r"keras-bn: error: [A-Za-z]+(Error|Exception|Exit): "


def _assert_refused(folder, monkeypatch, capfd, *arguments, expected=True):
    monkeypatch.chdir(folder)
    before = _content(folder)
    capfd.readouterr()
    try:
        code = keras_bn_command.main(list(arguments))
    except SystemExit as end:
        code = end.code
    printed, error = capfd.readouterr()
    assert code == 2, (code, printed, error)
    assert error.startswith("keras-bn: error: "), error
    assert error.count("\n") == 1 and error.endswith("\n"), error
    assert error.rstrip("\n").isprintable(), error
    assert not (expected and re.match(_UNEXPECTED, error)), error
    assert not printed
    assert _content(folder) == before
    return error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", MODELS, ids=ascii)
def test_models(model, command, folder, monkeypatch, capfd):
    arguments = COMMANDS[command]
    _assert_refused(folder, monkeypatch, capfd, command, model, *arguments)


@pytest.mark.parametrize("command", ["audit", "recalibrate", "export"])
@pytest.mark.parametrize("data", DATA, ids=ascii)
def test_data(data, command, folder, monkeypatch, capfd):
    arguments = [command, "good.keras", *COMMANDS[command], f"--data={data}"]
    _assert_refused(folder, monkeypatch, capfd, *arguments)


@pytest.mark.parametrize("command", ["audit", "recalibrate"])
@pytest.mark.parametrize("labels", LABELS)
def test_labels(labels, command, folder, monkeypatch, capfd):
    arguments = [command, "good.keras", *COMMANDS[command]]
    arguments += ["--data=unlabelled.npz", f"--labels={labels}"]
    _assert_refused(folder, monkeypatch, capfd, *arguments)


OUTPUTS = [
    *("missing/new.keras", "/proc/new.keras", "new.h5", "new", ""),
    *("folder.keras", "good.keras/new.keras", "a\0b.keras"),
]


@pytest.mark.parametrize("command", ["recalibrate", "convert", "fold"])
@pytest.mark.parametrize("output", OUTPUTS, ids=ascii)
def test_outputs(output, command, folder, monkeypatch, capfd):
    arguments = [command, "good.keras", "--output", output]
    if command == "recalibrate":
        arguments.append("--data=data.npz")
    _assert_refused(folder, monkeypatch, capfd, *arguments)


@pytest.mark.parametrize("output", ["good.keras", "text", "/proc/new", "a\0b"])
def test_outputs_of_export(output, folder, monkeypatch, capfd):
    arguments = ["export", "good.keras", "--output", output]
    _assert_refused(folder, monkeypatch, capfd, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["mend"],
        ["audit"],
        ["audit", "good.keras", "--what"],
        ["audit", "good.keras", f"--{ODD}"],
        ["audit", "good.keras", "more.keras"],
        ["audit", "good.keras", "--steps=x"],
        ["audit", "good.keras", "--data=data.npz", "--steps=0"],
        ["audit", "good.keras", "--data=data.npz", "--steps=99"],
        ["audit", "good.keras", "--data=data.npz", "--batch_size=0"],
        ["audit", "good.keras", "--labels=few.npy"],
        ["recalibrate", "good.keras"],
        ["recalibrate", "good.keras", "--data=data.npz"],
        ["recalibrate", "good.keras", "--method=none"],
        ["convert", "good.keras", "--output=new.keras", "--to=other"],
        ["convert", "good.keras", "--output=text.keras"],
        ["fold", "good.keras", "--output=text.keras"],
        ["export", "good.keras"],
        ["export", "good.keras", "--output=new", "--mean=x"],
        ["export", "good.keras", "--output=new", "--mean=1"],
    ],
    ids=ascii,
)
def test_flags(arguments, folder, monkeypatch, capfd):
    _assert_refused(folder, monkeypatch, capfd, *arguments)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        MemoryError(),
        RecursionError("deep"),
        RuntimeError("a\nb"),
    ],
    ids=repr,
)
def test_whatever_raises(error, folder, monkeypatch, capfd):
    def raises(options):
        raise error

    monkeypatch.setattr(cli, "audit", raises)
    arguments = folder, monkeypatch, capfd, "audit", "good.keras"
    said = _assert_refused(*arguments, expected=False)
    assert f"error: {type(error).__name__}: " in said
    monkeypatch.setenv("KERAS_BN_TRACEBACK", "1")
    assert keras_bn_command.main(["audit", "good.keras"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("Traceback") and "in raises" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "good.keras", "--data=large"],
        ["recalibrate", "deep_config.keras", *COMMANDS["recalibrate"]],
        ["fold", f"{ODD}.keras", "--output=new.keras"],
    ],
    ids=ascii,
)
def test_processes(arguments, folder):
    """Of which Python, Keras and the framework write what they like."""
    program = "import keras_bn_command, sys; sys.exit(keras_bn_command.main())"
    before = _content(folder)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("keras-bn: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert _content(folder) == before

"""Checks of files, folders and names that users bring.

They need neither Keras nor a framework, whose import takes seconds: the
command reports a wrong path before it. That is why this module is no part of
the package `keras_bn`, which imports both.
"""

import json
import lzma
import os
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

# TensorFlow Serving keeps a version in 64 bits.
LARGEST_VERSION = 2**63 - 1
# Bytes of text that are read of a file. The configs of the largest models of
# keras.applications have one million.
LARGEST_TEXT = 32 * 2**20
# Keras's own bounds of an archive's member.
_LARGEST_MEMBER = 2**32
_LARGEST_EXPANSION = 100
_HDF5 = b"\x89HDF\r\n\x1a\n"
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif"}
# Unicode's bidirectional controls: text is shown in another order.
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
# Outputs of these layers are as many as their inputs.
_KEEP_UNITS = {
    "Activation",
    "BatchNormalization",
    "Dropout",
    "LeakyReLU",
    "ReLU",
    "Softmax",
}


def is_control(character):
    """Whether a character acts on what shows it.

    Controls (ESC, NUL, tab), separators of lines and paragraphs,
    bidirectional controls, and halves of surrogate pairs.
    """
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL


def printable(text):
    """The text with escapes, `\\x1b`, for control characters but newlines."""
    return "".join(
        x.encode("unicode_escape").decode()
        if x != "\n" and is_control(x)
        else x
        for x in text
    )


def class_names(path):
    """The lines of a text file, which end in `\\n` or `\\r\\n`.

    Raises:
        ValueError: It is no file of UTF-8 text, too large, or a name has a
            control character.
        OSError: It cannot be read.
    """
    require_file(path, "--class_names")
    with open(path, "rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(
            f"the file of the classes' names is larger than "
            f"{LARGEST_TEXT // 2**20} MiB. Received: --class_names={path}"
        )
    try:
        # Some editors put a byte order mark first.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the names of the classes are not UTF-8 text. Received: {path}"
        ) from error
    names = [line.removesuffix("\r") for line in text.split("\n")]
    if not names[-1]:
        names.pop()
    for number, name in enumerate(names, 1):
        if not name or any(map(is_control, name)):
            raise ValueError(
                "the names of the classes must be one a line, without control "
                f"characters. Received: {name!r} in line {number} of {path}"
            )
    if not names:
        raise ValueError(
            f"the file of the classes' names is empty. Received: {path}"
        )
    return names


def require_file(path, what):
    """Refuses what is no regular file; a pipe would be read for ever.

    Raises:
        ValueError: It is none.
        OSError: It cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no such file. Received: {what}={path}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"not a file. Received: {what}={path}")


def json_member(path, name):
    """A JSON document in an archive.

    Args:
        path: Path of a .keras file.
        name: `"config.json"` or `"metadata.json"`.

    Raises:
        ValueError: The archive is damaged, or has no such document, or it is
            too large.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            # The size in the archive's directory may be a lie.
            content = file.read(LARGEST_TEXT + 1)
            if len(content) <= LARGEST_TEXT:
                return json.loads(content)
    except (
        EOFError,
        KeyError,
        RecursionError,
        RuntimeError,  # encrypted, or a compression that is unknown here
        ValueError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"the file is damaged, or no model of Keras 3: its {name} cannot "
            f"be read. Received: {path}. Save the model again with "
            "model.save(...)"
        ) from error
    raise ValueError(
        f"the model's {name} is larger than {LARGEST_TEXT // 2**20} MiB. "
        f"Received: {path}"
    )


def refuse_bomb(path):
    """Refuses an archive that would fill the memory.

    Raises:
        ValueError: A member is larger than 4 GiB and more than 100 times as
            large as what is stored of it.
        zipfile.BadZipFile: It is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        for one in archive.infolist():
            # A member is never read beyond the size that is given for it.
            if (
                one.file_size > _LARGEST_MEMBER
                and one.file_size > _LARGEST_EXPANSION * one.compress_size
            ):
                raise ValueError(
                    f"{one.filename} would take {one.file_size / 2**30:.1f} "
                    f"GiB of memory, of {one.compress_size / 2**20:.1f} MiB "
                    "in the file"
                )


def is_hdf5(path):
    """Whether a file has HDF5's signature, at 0 or a power of 2 from 512."""
    size, offset = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            if file.read(len(_HDF5)) == _HDF5:
                return True
            offset = 2 * offset or 512
    return False


def number_of_outputs(config):
    """How many outputs a model has, if its config says so plainly.

    Args:
        config: The JSON document of a model or a layer.

    Returns:
        Int; None where Keras has to tell.
    """
    try:
        return _number_of_outputs(config)
    except (LookupError, RecursionError, TypeError, ValueError):
        # Of several outputs, or not as Keras writes it; loading says more.
        return None


def _number_of_outputs(config):
    kind, inner = config["class_name"], config["config"]
    if config["registered_name"] not in (None, "Functional", "Sequential"):
        # Of the user, who may call it Dense.
        return None
    if kind == "Dense":
        units = inner["units"]
        return units if isinstance(units, int) else None
    if kind == "Sequential":
        for layer in reversed(inner["layers"]):
            if not _keeps_units(layer):
                return _number_of_outputs(layer)
    if kind == "Functional":
        layers = {one["name"]: one for one in inner["layers"]}
        outputs = inner["output_layers"]
        # A list of one, or one itself.
        name = outputs[0]
        if isinstance(name, list):
            ((name, _, _),) = outputs
        for _ in layers:
            layer = layers[name]
            if not _keeps_units(layer):
                return _number_of_outputs(layer)
            (tensor,) = layer["inbound_nodes"][0]["args"]
            name = tensor["config"]["keras_history"][0]
    return None


def _keeps_units(config):
    ours = (None, "keras_bn>BatchNormalization")
    return config["class_name"] in _KEEP_UNITS and (
        config["registered_name"] in ours
    )


def check_destination(directory, version):
    """Finds out whether a version may be published there; changes nothing.

    Args:
        directory: Path of the model, above its versions.
        version: Int of at least 1, or None.

    Raises:
        ValueError: `version` is no number of a version or is there already;
            or `directory` is a file, or a directory with something in it but
            no versions, which belongs to something else.
    """
    if version is not None and not (
        isinstance(version, int)
        and not isinstance(version, bool)
        and 1 <= version <= LARGEST_VERSION
    ):
        raise ValueError(
            "`version` must be an integer from 1 to 2 ** 63 - 1, or None for "
            f"the next one. Received: version={version!r}."
        )
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(
            "`directory` must be a directory, or new. "
            f"Received: directory={str(directory)!r}, a file."
        )
    names = os.listdir(directory) if directory.is_dir() else []
    versions = versions_in(directory)
    others = [n for n in names if not n.startswith(".")]
    if others and not versions:
        raise ValueError(
            "`directory` holds something else than numbered versions of a "
            f"model: {sorted(others)[:3]}. Received: "
            f"directory={str(directory)!r}. Name a new or an empty one."
        )
    if version in versions:
        raise ValueError(
            "`version` is published already, and versions are never changed. "
            f"Received: version={version}, with {sorted(versions)[-5:]} in "
            f"{str(directory)!r}. Leave it out for the next free number."
        )
    if version is None and LARGEST_VERSION in versions:
        raise ValueError(
            f"There is no version after {LARGEST_VERSION}. "
            f"Received: directory={str(directory)!r}. Name a new directory."
        )


def versions_in(directory):
    """The set of the versions' numbers in a directory, which may be new."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return {int(n) for n in names if n.isascii() and n.isdigit()}


def check_writable(folder, what):
    """Finds out whether a folder can be written to, or else be made.

    Args:
        folder: Path; may be missing, with folders above it.
        what: The flag and its value, for the message.

    Raises:
        ValueError: It cannot.
    """
    folder = Path(folder).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        # The permissions do not tell: /proc has the root user's.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write there: no file can be made in {folder} "
            f"({error.strerror}). Received: {what}. Name a place in a folder "
            "that you may write to"
        ) from error


def check_data(data, labels):
    """Finds out whether what `--data` and `--labels` name is there.

    Args:
        data: Str: an `.npz` file, a folder of images, or the name of a
            dataset of TensorFlow Datasets.
        labels: Str or None: an `.npy` file.

    Raises:
        ValueError: It is not there, or something else.
        OSError: It cannot be looked at.
    """
    if data.endswith(".npz"):
        require_file(data, "--data")
        try:
            refuse_bomb(data)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"the file of arrays cannot be read ({error}). "
                f"Received: --data={data}. Write it with numpy.savez"
            ) from error
        if labels is not None:
            require_file(labels, "--labels")
        return
    if labels is not None:
        raise ValueError(
            "--labels belong to an .npz file; folders and datasets bring "
            f"their own. Received: --labels={labels}. Leave it out"
        )
    path = Path(data)
    if path.is_dir():
        folders = [path, *(x for x in path.iterdir() if x.is_dir())]
        if not any(map(images_in, folders)):
            raise ValueError(
                f"the folder holds no images. Received: --data={data}. "
                "Give one of .png or .jpg files, or of folders of them"
            )
    elif path.suffix or path.exists() or data.startswith((".", "/")):
        raise ValueError(
            "--data must be an .npz file, a folder of images or a dataset. "
            f"Received: --data={data}. There is no such folder"
        )


def images_in(folder):
    """The sorted paths of the images in a folder, by their endings."""
    return sorted(x for x in folder.iterdir() if x.suffix.lower() in _IMAGES)

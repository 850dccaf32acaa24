"""Versions of a model in a directory, each there whole or not at all.

A model server watches `directory` and loads the subdirectory with the highest
number as soon as it sees it (TensorFlow Serving's file-system source; others
copied it). So a version is written under a hidden name, which servers skip,
and renamed when every byte is on the disk.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from pathlib import Path

# TensorFlow Serving keeps a version in 64 bits.
LARGEST_VERSION = 2**63 - 1
_UNFINISHED = ".unfinished-"


def check_destination(directory, version):
    """Finds out whether `publish` may publish there, and changes nothing.

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
    versions = _versions(directory)
    others = [n for n in _names(directory) if not n.startswith(".")]
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


def publish(directory, version, fill):
    """Publishes what `fill` writes as a version, atomically.

    Whatever fails before the rename, a full disk or a kill included, leaves
    the published versions as they are and no new one. A killed process leaves
    a hidden folder behind, which the next call removes.

    Args:
        directory: Path of the model; made where it is missing.
        version: Int of at least 1, or None: one more than the highest number
            there, also where several processes publish at once.
        fill: Function of the path of an empty folder; writes the version.

    Returns:
        `pathlib.Path` of the version.

    Raises:
        ValueError: As `check_destination`.
        OSError: The folders cannot be made, written or renamed.
        Exception: What `fill` raises.
    """
    check_destination(directory, version)
    directory = Path(directory)
    made = _make_directories(directory)
    try:
        _remove_unfinished(directory)
        unfinished = directory / f"{_UNFINISHED}{uuid.uuid4().hex}"
        # Not a private folder as `tempfile` makes: the server is another user.
        unfinished.mkdir()
        # Tells the next call that this one is still at it.
        held = os.open(unfinished, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fill(unfinished)
            _flush(unfinished)
            published = _rename(unfinished, directory, version)
            _flush_one(directory)
            return published
        finally:
            os.close(held)
            shutil.rmtree(unfinished, ignore_errors=True)
    except BaseException:
        for folder in made:
            # Unless somebody else has put something in it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _names(directory):
    return os.listdir(directory) if directory.is_dir() else []


def _versions(directory):
    names = _names(directory)
    return {int(n) for n in names if n.isascii() and n.isdigit()}


def _make_directories(directory):
    """Makes the missing folders; returns them, the innermost first."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _flush_one(folder.parent)
    return missing


def _remove_unfinished(directory):
    for folder in directory.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if not os.listdir(folder):
                # Just made by a process that has not locked it yet.
                continue
            held = os.open(folder, os.O_RDONLY)
            try:
                # Fails where its process is alive.
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


def _rename(unfinished, directory, version):
    while True:
        number = version or max(_versions(directory), default=0) + 1
        try:
            # Never replaces a version, which is a folder with something in it.
            os.rename(unfinished, directory / str(number))
            return directory / str(number)
        except OSError as error:
            taken = error.errno in (
                errno.EEXIST,
                errno.ENOTEMPTY,
                errno.ENOTDIR,
            )
            if not taken:
                raise
            # Another process was faster.
            check_destination(directory, version)


def _flush(folder):
    """Waits until a folder with all that is in it is on the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            _flush_one(os.path.join(path, name))
        _flush_one(path)


def _flush_one(path):
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

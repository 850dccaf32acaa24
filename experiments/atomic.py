"""Files written whole or not at all, whatever ends the program or machine."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments import ExperimentError


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file so that no reader ever sees half of it.

    Args:
        path: file to write or replace; missing folders above it are made.
        text: its whole content, written as UTF-8.

    Raises:
        ExperimentError: the file cannot be written; what was there stays.
    """
    path = Path(path)
    with _one_line(path), contextlib.ExitStack() as cleanup:
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}."
        )
        cleanup.callback(Path(temporary).unlink, missing_ok=True)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            to_disk(file.fileno())
        # mkstemp makes the file private; give it the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        to_disk(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path of the same suffix to write to; on success it is `path`.

    What was there stays until the new file is whole and on the disk. One
    process at a time may write a file so.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    make_folder(path.parent)
    incomplete = path.with_name(f"incomplete.{path.name}")
    try:
        yield incomplete
        to_disk(incomplete)
        os.replace(incomplete, path)
        to_disk(path.parent)
    finally:
        incomplete.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        OSError: one cannot be made.
    """
    missing = [x for x in (path, *path.parents) if not x.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        to_disk(folder.parent)


def to_disk(file: Path | str | int) -> None:
    """Waits until a file, or the names in a folder, would outlive the power.

    Windows opens no folders, and has nothing to wait for there.

    Args:
        file: path, or descriptor of an open file.
    """
    if isinstance(file, int):
        os.fsync(file)
        return
    # Windows flushes only what may be written to.
    mode = os.O_RDWR
    if os.path.isdir(file):
        if not hasattr(os, "O_DIRECTORY"):
            return
        mode = os.O_RDONLY | os.O_DIRECTORY
    descriptor = os.open(file, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path | str) -> None:
    """Finds out now whether `write_text` could write there later.

    Args:
        path: file that is to be written.

    Raises:
        ExperimentError: it cannot be: a folder stands there, or its own
            folder cannot be made or written to.
    """
    path = Path(path)
    with _one_line(path):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        _try_folder(path.parent)


def check_folder(path: Path | str) -> None:
    """Finds out now whether files could be written in a folder later.

    Args:
        path: folder; it and those above it may be missing.

    Raises:
        ExperimentError: it is a file, or cannot be made or written to.
    """
    try:
        _try_folder(Path(path))
    except OSError as error:
        raise ExperimentError(
            f"cannot write to the folder {path} ({error.strerror}): give one "
            "that you may write to"
        ) from error


def _try_folder(folder):
    # Tried on what exists: nothing is made for a program that then fails.
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _one_line(path: Path):
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            f"cannot write {path}: {error.strerror}; name a file in a folder "
            "that you may write to"
        ) from error

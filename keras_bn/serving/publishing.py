"""Versions of a model in a directory, each there whole or not at all.

A model server watches `directory` and loads the subdirectory with the highest
number as soon as it sees it (TensorFlow Serving's file-system source; others
copied it). So a version is written under a hidden name, which servers skip,
and renamed when every byte is on the disk.
"""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

import filelock

from keras_bn_checks import check_destination
from keras_bn_checks import versions_in

_UNFINISHED = ".unfinished-"
_LOCK = ".lock"
# Windows flushes what is open for writing alone.
_FOR_FLUSHING = os.O_RDWR if os.name == "nt" else os.O_RDONLY


def publish(directory, version, fill):
    """Publishes what `fill` writes as a version, atomically.

    Whatever fails before the rename, a full disk or a kill included, leaves
    the published versions as they are and no new one. A killed process leaves
    a hidden folder and the file that it had locked, which the next call
    removes.

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
        # Before the folder is there: it is never without the lock that tells
        # others that this call is still at it.
        with _locked(unfinished, wait=True):
            try:
                # Not a private folder as `tempfile` makes: the server is
                # another user.
                unfinished.mkdir()
                fill(unfinished)
                _flush(unfinished)
                published = _rename(unfinished, directory, version)
                _flush_one(directory)
                return published
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except BaseException:
        for folder in made:
            # Unless somebody else has put something in it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


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
    """Removes what killed processes left; others hold their locks."""
    found = [n for n in os.listdir(directory) if n.startswith(_UNFINISHED)]
    for name in {n.removesuffix(_LOCK) for n in found}:
        folder = directory / name
        with contextlib.suppress(OSError), _locked(folder, wait=False):
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder, wait):
    """Holds the lock of an unfinished version, whose file goes with it.

    The system gives it back when the process ends, however it does.

    Raises:
        OSError: The lock cannot be had. With `wait` another process has it
            for a moment alone, and a disk without locks needs none: nobody
            removes anything there.
    """
    # A soft lock would outlive a killed process.
    lock = filelock.FileLock(
        f"{folder}{_LOCK}", blocking=wait, fallback_to_soft=False
    )
    try:
        lock.acquire()
    except OSError:
        if not wait:
            raise
    try:
        yield
    finally:
        # While it is held: who waits for it sees that it is gone.
        removed = _removed(lock.lock_file)
        lock.release()
        if not removed:
            # Windows removes no file that is open, by whatever process.
            _removed(lock.lock_file)


def _removed(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def _rename(unfinished, directory, version):
    while True:
        number = version or max(versions_in(directory), default=0) + 1
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
    try:
        opened = os.open(path, _FOR_FLUSHING)
    except PermissionError:
        if os.path.isdir(path):
            # Windows opens no folders; it keeps their names by itself.
            return
        raise
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

"""Versions appear whole or not at all. No framework is needed."""

import errno
import os
import subprocess
import sys
import threading

import filelock
import pytest

from keras_bn.serving import publishing
from keras_bn.serving.publishing import publish
from keras_bn_checks import LARGEST_VERSION
from keras_bn_checks import check_destination
from tests import locks
from tests import without_posix
from tests.waiting import LIMIT


def _fill(folder):
    (folder / "model").write_text("whole")
    (folder / "assets").mkdir()
    (folder / "assets" / "labels").write_text("cat\n")


def _tree(directory):
    """What a server sees: names and contents, hidden folders left out."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
        and not path.relative_to(directory).parts[0].startswith(".")
    }


def _hidden(directory):
    return [n for n in os.listdir(directory) if n.startswith(".")]


def test_numbers(tmp_path):
    directory = tmp_path / "new" / "model"
    assert publish(directory, None, _fill) == directory / "1"
    assert publish(directory, None, _fill) == directory / "2"
    assert publish(str(directory), 7, _fill) == directory / "7"
    assert publish(directory, None, _fill) == directory / "8"
    assert publish(directory, 3, _fill) == directory / "3"
    (directory / "0010").mkdir()  # a server reads 10
    assert publish(directory, None, _fill) == directory / "11"
    assert _tree(directory / "8") == {
        "model": b"whole",
        "assets/labels": b"cat\n",
    }
    assert not _hidden(directory)
    # As the umask says: the server is another user.
    mode = os.stat(directory / "8").st_mode & 0o777
    assert mode == os.stat(directory).st_mode & 0o777


def test_a_watcher_sees_nothing_unfinished(tmp_path):
    seen = []

    def fill(folder):
        for number in range(20):
            (folder / str(number)).write_text("x")
            seen.append([n for n in os.listdir(tmp_path) if n.isdigit()])

    published = publish(tmp_path, None, fill)
    assert seen == [[]] * 20
    assert len(os.listdir(published)) == 20


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()]
)
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    def fail(folder):
        _fill(folder)
        raise error

    directory = tmp_path / "a" / "model"
    with pytest.raises(type(error)):
        publish(directory, None, fail)
    assert not os.listdir(tmp_path)
    publish(directory, None, _fill)
    before = _tree(directory)
    with pytest.raises(type(error)):
        publish(directory, None, fail)
    assert os.listdir(directory) == ["1"]
    assert _tree(directory) == before


def test_a_disk_that_does_not_take_the_bytes(tmp_path, monkeypatch):
    """Which may come out as late as when they are flushed."""
    publish(tmp_path, None, _fill)

    def flush(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(publishing, "_flush_one", flush)
    with pytest.raises(OSError, match="Input/output"):
        publish(tmp_path, None, _fill)
    assert os.listdir(tmp_path) == ["1"]


# The package's parents are empty: their import is that of Keras.
_KILLED = """
import importlib.util, pathlib, sys, types

package = types.ModuleType("keras_bn")
spec = importlib.util.find_spec("keras_bn")
package.__path__ = spec.submodule_search_locations
sys.modules["keras_bn"] = package
from keras_bn.serving import publishing

directory, point = sys.argv[1:]

def stop(*_, **__):
    print("there", flush=True)
    sys.stdin.read()

def fill(folder):
    if point == "empty":
        stop()
    (folder / "model").write_text("half")
    if point == "filling":
        stop()

def mkdir(path, *arguments, **options):
    if path.name.startswith(".unfinished"):
        stop()

def rename(*arguments):
    real(*arguments)
    stop()

if point == "locked":
    pathlib.Path.mkdir = mkdir
if point == "flushing":
    publishing._flush = stop
if point == "removing":
    publishing.shutil.rmtree = stop
if point == "renamed":
    real, publishing._rename = publishing._rename, rename
publishing.publish(directory, None, fill)
"""


@pytest.mark.parametrize(
    "point", ["removing", "locked", "empty", "filling", "flushing", "renamed"]
)
def test_a_kill(point, tmp_path):
    publish(tmp_path, None, _fill)
    if point == "removing":
        (tmp_path / ".unfinished-0").mkdir()
    before = _tree(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, tmp_path, point],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout.readline() == b"there\n"
        left = sorted(_hidden(tmp_path))
        assert left
        # While it is at it, another one publishes and leaves it alone.
        number = 3 if point == "renamed" else 2
        assert publish(tmp_path, None, _fill) == tmp_path / str(number)
        assert sorted(_hidden(tmp_path)) == left
    finally:
        child.kill()
        child.communicate()
    assert _tree(tmp_path / str(number)) == _tree(tmp_path / "1")
    assert before.items() <= _tree(tmp_path).items()
    # Of the killed one all is seen, or nothing.
    half = (tmp_path / "2" / "model").read_text() == "half"
    assert half == (point == "renamed")
    assert sorted(_hidden(tmp_path)) == left
    assert publish(tmp_path, None, _fill) == tmp_path / str(number + 1)
    assert not _hidden(tmp_path)


def test_the_next_holder_of_a_lock_is_alone(tmp_path, monkeypatch):
    locks.check_that_next_holder_is_alone(
        monkeypatch, lambda: publish(tmp_path, None, _fill)
    )


def test_a_disk_without_locks(tmp_path, monkeypatch):
    class Failing:
        def __init__(self, lock_file, **options):
            self.lock_file = lock_file

        def acquire(self):
            raise OSError(errno.ENOLCK, "No locks available")

        def release(self):
            pass

    monkeypatch.setattr(filelock, "FileLock", Failing)
    assert publish(tmp_path, None, _fill) == tmp_path / "1"
    # Whether its process is alive cannot be told.
    (tmp_path / ".unfinished-0").mkdir()
    assert publish(tmp_path, None, _fill) == tmp_path / "2"
    assert _hidden(tmp_path) == [".unfinished-0"]


def test_where_posix_is_not(tmp_path):
    """As on Windows, where no folder is flushed and no open file removed."""
    without_posix.run(
        """
        import os, sys
        from keras_bn.serving.publishing import publish

        def fill(folder):
            (folder / "assets").mkdir()
            (folder / "assets" / "labels").write_text("cat")

        (directory,) = sys.argv[1:]
        os.mkdir(os.path.join(directory, ".unfinished-0"))
        assert publish(directory, None, fill).name == "1"
        assert publish(directory, None, fill).name == "2"
        assert sorted(os.listdir(directory)) == ["1", "2"]
        """,
        tmp_path,
    )


def test_several_publish_at_once(tmp_path):
    together = threading.Barrier(4, timeout=LIMIT)

    def fill(folder):
        _fill(folder)
        together.wait()

    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(publish(tmp_path, None, fill))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in found) == ["1", "2", "3", "4"]
    for path in found:
        assert _tree(path)["model"] == b"whole"


def test_a_number_taken_while_writing(tmp_path):
    def fill(folder):
        _fill(folder)
        if not (tmp_path / "5").exists():
            publish(tmp_path, 5, _fill)

    with pytest.raises(ValueError, match="published already"):
        publish(tmp_path, 5, fill)
    assert os.listdir(tmp_path) == ["5"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / ".hidden").write_text("")
    assert publish(tmp_path, None, _fill) == tmp_path / "1"


@pytest.mark.parametrize(
    "version", [0, -1, 1.0, True, "1", 2**63, [1], float("nan")]
)
def test_versions_that_are_none(tmp_path, version):
    with pytest.raises(ValueError) as error:
        check_destination(tmp_path, version)
    assert f"Received: version={version!r}." in str(error.value)
    assert not os.listdir(tmp_path)


def test_destinations_that_are_none(tmp_path):
    def refused(directory, version, match):
        with pytest.raises(ValueError, match=match) as error:
            publish(directory, version, _fill)
        assert "\n" not in str(error.value)
        assert "Received: " in str(error.value)

    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", None, "a file")
    refused(tmp_path, None, "something else than numbered versions")
    # A SavedModel itself, and not the directory above it.
    publish(tmp_path / "model", 2, _fill)
    refused(tmp_path / "model" / "2", None, "something else")
    refused(tmp_path / "model", 2, "published already")
    last = LARGEST_VERSION
    publish(tmp_path / "model", last, _fill)
    refused(tmp_path / "model", None, "no version after")
    assert sorted(os.listdir(tmp_path / "model")) == ["2", str(last)]
    assert (tmp_path / "file").read_text() == "mine"

"""Versions appear whole or not at all. No framework is needed."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from keras_bn.serving import publishing
from keras_bn.serving.publishing import check_destination
from keras_bn.serving.publishing import publish


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


_KILLED = """
import sys, time
from keras_bn.serving.publishing import publish

def fill(folder):
    (folder / "model").write_text("half")
    print("filling", flush=True)
    time.sleep(600)

publish(sys.argv[1], None, fill)
"""


def test_a_kill_in_the_middle(tmp_path):
    publish(tmp_path, None, _fill)
    before = _tree(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, tmp_path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout.readline() == b"filling\n"
        # While it is at it, another one publishes and leaves it alone.
        assert publish(tmp_path, None, _fill) == tmp_path / "2"
        assert len(_hidden(tmp_path)) == 1
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert _tree(tmp_path / "2") == _tree(tmp_path / "1")
    assert {n: b for n, b in _tree(tmp_path).items() if n[0] == "1"} == before
    assert len(_hidden(tmp_path)) == 1
    assert publish(tmp_path, None, _fill) == tmp_path / "3"
    assert not _hidden(tmp_path)


def test_several_publish_at_once(tmp_path):
    together = threading.Barrier(4, timeout=60)

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
    last = publishing.LARGEST_VERSION
    publish(tmp_path / "model", last, _fill)
    refused(tmp_path / "model", None, "no version after")
    assert sorted(os.listdir(tmp_path / "model")) == ["2", str(last)]
    assert (tmp_path / "file").read_text() == "mine"

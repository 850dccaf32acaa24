"""The download of CIFAR-10, which here never succeeds by itself."""

import contextlib
import os
import socket
import threading

import pytest

from experiments import ExperimentError
from experiments import data
from experiments import download


@pytest.fixture
def silent_server():
    """The address of a server that accepts and never sends a byte."""
    listening = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def accept():
        try:
            while True:
                accepted.append(listening.accept()[0])
        except OSError:  # closed below
            pass

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()
    for connection in accepted:
        connection.close()


def test_a_stalled_download_is_given_up(tmp_path, monkeypatch, silent_server):
    pytest.importorskip("tensorflow_datasets")
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, silent_server)
    monkeypatch.setattr(download, "STALL_SECONDS", 8.0)
    with pytest.raises(
        download.DownloadError, match="no byte arrived for 8 seconds"
    ):
        data.load("cifar10", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PREPARE", "raise OSError('no route')")
    with pytest.raises(download.DownloadError, match="OSError: no route"):
        download.download(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_download_arrives_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(
        download,
        "_PREPARE",
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1], 'cifar10', '3.0.2')\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'dataset_info.json').write_text('all')\n",
    )
    download.download(str(tmp_path / "new"))
    found = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert found == [tmp_path / "new/cifar10/3.0.2/dataset_info.json"]


@pytest.mark.parametrize(("pause", "stalls"), [(1.5, False), (2.5, True)])
def test_bytes_that_arrive_keep_a_download_alive(
    pause, stalls, tmp_path, monkeypatch
):
    """A byte now and then for 20 seconds, against a limit of 2."""
    part, now, last = tmp_path / "part", 0.0, 0.0

    class Process:
        def poll(self):
            nonlocal last
            if now - last >= pause:
                last = now
                with open(part, "ab") as file:
                    file.write(b"x")
            return 0 if now > 20 else None

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(download.time, "monotonic", lambda: now)
    monkeypatch.setattr(download.time, "sleep", sleep)
    with contextlib.ExitStack() as stack:
        if stalls:
            stack.enter_context(
                pytest.raises(download.DownloadError, match="for 2 seconds")
            )
        download._await_download(Process(), str(tmp_path), 2.0)
    assert (now > 20) is not stalls


def test_an_unwritable_data_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ExperimentError, match="cannot write to the data"):
        download.download(str(file / "below"))

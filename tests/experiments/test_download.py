"""The download of CIFAR-10, which here never succeeds by itself."""

import os
import socket
import subprocess
import sys
import threading
import time

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
    began = time.monotonic()
    with pytest.raises(
        download.DownloadError, match="no byte arrived for 8 seconds"
    ):
        data.load("cifar10", str(tmp_path))
    assert time.monotonic() - began < 60
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


def test_bytes_that_arrive_keep_a_download_alive(tmp_path):
    # A byte every 0.3 s for 3 s, against a limit of 2 s.
    drip = (
        "import sys, time\n"
        "with open(sys.argv[1], 'wb', buffering=0) as file:\n"
        "    for _ in range(10):\n"
        "        file.write(b'x')\n"
        "        time.sleep(0.3)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", drip, str(tmp_path / "part")]
    )
    download._await_download(process, str(tmp_path), 2.0)
    assert process.returncode == 0


def test_an_unwritable_data_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ExperimentError, match="cannot write to the data"):
        download.download(str(file / "below"))

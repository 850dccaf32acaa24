"""Downloads CIFAR-10 through TFDS, and gives up on a dead connection."""

import os
import shutil
import subprocess
import sys
import tempfile
import time

from experiments import ExperimentError
from experiments import progress

STALL_SECONDS = 30.0  # without a byte for this long, a download is given up
ARCHIVE_BYTES = 170_052_171  # cifar-10-binary.tar.gz


class DownloadError(ExperimentError):
    """CIFAR-10 could not be downloaded."""


_PREPARE = """
import importlib.util, sys
import tensorflow_datasets as tfds
has_tensorflow = importlib.util.find_spec("tensorflow") is not None
tfds.disable_progress_bar()
tfds.builder(
    "cifar10",
    data_dir=sys.argv[1],
    file_format=None if has_tensorflow else "array_record",
).download_and_prepare()
"""


def download(data_dir: str, stall_seconds: float | None = None) -> None:
    """Downloads CIFAR-10 and prepares it in `data_dir`.

    TFDS sets no time limit on a connection, so it works in a process of its
    own and in a folder of its own, which are given up when no byte has
    arrived for `stall_seconds` (default: `STALL_SECONDS`). Nothing is left
    behind then.

    Raises:
        DownloadError: the download stalled or failed, or `data_dir` cannot
            be written to.
    """
    try:
        os.makedirs(data_dir, exist_ok=True)
        staging = tempfile.mkdtemp(prefix="cifar10-download-", dir=data_dir)
    except OSError as error:
        raise DownloadError(
            f"cannot write to the data folder {data_dir} ({error.strerror})"
        ) from error
    try:
        with open(os.path.join(staging, "log"), "w+b") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _PREPARE, staging],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
            try:
                _await_download(
                    process,
                    os.path.join(staging, "downloads"),
                    stall_seconds or STALL_SECONDS,
                )
            finally:
                process.kill()
                process.wait()
            if process.returncode:
                log.seek(0)
                lines = log.read().decode(errors="replace").split("\n")
                reason = next((x for x in lines[::-1] if x.strip()), "")
                raise DownloadError(
                    f"CIFAR-10 could not be downloaded ({reason.strip()[:200]})"
                )
        prepared = os.path.join(staging, "cifar10")
        os.makedirs(os.path.join(data_dir, "cifar10"), exist_ok=True)
        for version in os.listdir(prepared):
            os.rename(
                os.path.join(prepared, version),
                os.path.join(data_dir, "cifar10", version),
            )
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _await_download(process, folder, stall_seconds):
    """Waits for `process`, which downloads into `folder`, to end."""
    seen, last_byte = 0, time.monotonic()
    with progress.bar(
        "CIFAR-10", ARCHIVE_BYTES, "B", unit_scale=True
    ) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            size = min(_bytes_below(folder), ARCHIVE_BYTES)
            if size > seen:
                bar.update(size - seen)
                seen, last_byte = size, time.monotonic()
            if seen == ARCHIVE_BYTES:
                # All here: unpacking may take as long as it likes.
                bar.set_description("CIFAR-10, preparing")
            elif time.monotonic() - last_byte > stall_seconds:
                raise DownloadError(
                    "CIFAR-10 could not be downloaded (no byte arrived for "
                    f"{stall_seconds:g} seconds)"
                )


def _bytes_below(folder):
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except OSError:  # renamed by the downloader in the meantime
                pass
    return total

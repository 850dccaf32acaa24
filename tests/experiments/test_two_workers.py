"""Two workers on this machine, and what becomes of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).parents[2]
# Workers that train for ever, in place of Python.
_PROGRAM = """
import sys
import experiments
from experiments import two_workers

sys.executable = sys.argv.pop()
experiments.launch(lambda argv: two_workers.run("torch", []))
"""


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_terminal_that_closes_leaves_no_workers(tmp_path):
    worker = tmp_path / "worker"
    worker.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/$RANK.new\n"
        f"mv {tmp_path}/$RANK.new {tmp_path}/$RANK.pid\nexec sleep 600\n"
    )
    worker.chmod(0o700)
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(worker)],
        cwd=_ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while len(files := list(tmp_path.glob("*.pid"))) < 2:
        assert program.poll() is None and time.monotonic() - began < 60
        time.sleep(0.05)
    workers = [int(file.read_text()) for file in files]
    program.send_signal(signal.SIGHUP)
    _, errors = program.communicate(timeout=60)
    running = [worker for worker in workers if _is_running(worker)]
    for worker in running:
        os.kill(worker, signal.SIGKILL)
    assert not running
    assert program.returncode == 129
    assert errors.splitlines()[-1].startswith("interrupted: ")

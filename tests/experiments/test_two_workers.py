"""Two workers on this machine, and what becomes of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests.waiting import LIMIT
from tests.waiting import wait_until

_ROOT = Path(__file__).parents[2]
# With workers that are shell scripts, in place of Python.
_PROGRAM = """
import sys
import experiments
from experiments import train
from experiments import two_workers

sys.executable = sys.argv.pop()
train.define_flags()
experiments.launch({})
"""
# Without Keras.
_RUN = 'lambda argv: two_workers.run("torch", [])'


def _start(program, worker, script, before=""):
    worker.write_text(f"#!/bin/sh\n{script}")
    worker.chmod(0o700)
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            before + _PROGRAM.format(program),
            "--condition=3",
            "--synchronized",
            str(worker),
        ],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_terminal_that_closes_leaves_no_workers(tmp_path):
    program = _start(
        _RUN,
        tmp_path / "worker",
        f"echo $$ > {tmp_path}/$RANK.new\n"
        f"mv {tmp_path}/$RANK.new {tmp_path}/$RANK.pid\nexec sleep 600\n",
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, program)
        program.send_signal(signal.SIGHUP)
        _, errors = program.communicate(timeout=LIMIT)
    finally:
        program.kill()
        workers = [int(x.read_text()) for x in tmp_path.glob("*.pid")]
        running = [worker for worker in workers if _is_running(worker)]
        for worker in running:
            os.kill(worker, signal.SIGKILL)
    assert not running
    assert program.returncode == 129
    assert errors.splitlines()[-1].startswith("interrupted: ")


# A signal comes while the first, or the second, worker is being started.
_INTERRUPTED_START = """lambda argv: (
    setattr(subprocess, "Popen", interrupted),
    two_workers.run("torch", []),
)
"""
_INTERRUPTED = """
import os, signal, subprocess


really, started = subprocess.Popen, []

def interrupted(*arguments, **options):
    started.append(really(*arguments, **options))
    if len(started) == COUNT:
        os.kill(os.getpid(), signal.SIGHUP)
    return started[-1]
"""


@pytest.mark.parametrize("count", [1, 2])
def test_a_start_that_is_interrupted_leaves_no_workers(tmp_path, count):
    program = _start(
        _INTERRUPTED_START,
        tmp_path / "worker",
        f"echo $$ > {tmp_path}/$RANK.pid\nexec sleep 600\n",
        _INTERRUPTED.replace("COUNT", str(count)),
    )
    _, errors = program.communicate(timeout=LIMIT)
    assert program.returncode == 129
    assert errors.splitlines()[-1].startswith("interrupted: ")
    files = list(tmp_path.glob("*.pid"))
    assert len(files) <= count
    # One that was ended at once may not have written its number.
    started = [int(text) for x in files if (text := x.read_text())]
    assert not any(map(_is_running, started))


def test_the_chief_is_shown_and_the_flags_are_both_workers(tmp_path):
    backend = keras.backend.backend()
    name, chief = {
        "tensorflow": ("multiworker", '"index": 0'),
        "jax": ("data_parallel", "KERAS_DISTRIBUTION_PROCESS_ID=0"),
        "torch": ("ddp", "RANK=0"),
    }[backend]
    program = _start(
        "two_workers.main",
        tmp_path / "worker",
        f'echo "$@" >> {tmp_path}/given\n'
        f"env | grep -q '{chief}' && echo the chief || echo the other\n",
    )
    said, errors = program.communicate(timeout=LIMIT)
    assert program.returncode == 0, errors
    assert said == "the chief\n"
    given = "-m experiments.train --condition=3 --synchronized"
    given += f" --distribution={name}"
    assert (tmp_path / "given").read_text().splitlines() == [given] * 2


def test_a_worker_that_fails_is_quoted(tmp_path):
    program = _start(
        _RUN,
        tmp_path / "worker",
        "test $RANK = 0 && exit 0\necho a note\necho the reason\nexit 3\n",
    )
    _, errors = program.communicate(timeout=LIMIT)
    assert program.returncode == 1
    assert errors == (
        "error: worker 1 of 0 and 1 ended with exit code 3: the reason\n"
    )


def test_under_nohup_a_terminal_that_closes_is_nothing(tmp_path):
    """What is told to ignore it goes on, and so do its workers."""
    program = _start(
        "lambda argv: (os.kill(os.getpid(), signal.SIGHUP), "
        'two_workers.run("torch", []))[1]',
        tmp_path / "worker",
        "kill -HUP $$\necho went on\n",
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n",
    )
    said, errors = program.communicate(timeout=LIMIT)
    assert (program.returncode, said, errors) == (0, "went on\n", "")

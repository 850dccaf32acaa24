"""What every program shares, in a process of its own as absl ends it."""

import subprocess
import sys

import pytest

PROGRAM = (
    "import experiments; from absl import logging; "
    "experiments.launch(lambda argv: logging.info('a progress note'))"
)
# The signal arrives while Python is called from C, as JAX has it called by
# the garbage collector: what is raised there goes no further.
SWALLOWING = """
import gc, os, signal
import experiments

def signalled(phase, info):
    os.kill(os.getpid(), signal.SIGINT)

def main(argv):
    gc.callbacks.append(signalled)
    gc.collect()
    gc.callbacks.remove(signalled)
    print("going on")
    experiments.raise_if_interrupted()

experiments.launch(main)
"""
SIGNALLED = """
import os, signal
import experiments

experiments.launch(lambda argv: os.kill(os.getpid(), signal.{}))
"""

# A block that stops where it can, and what a second signal does to it.
DEFERRING = """
import os, signal
import experiments

def main(argv):
    with experiments.interruptions_deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        print("finishing")
        {}
        print("not reached")

experiments.launch(main)
"""

# Computes, and reads what the user has of TensorFlow's as a data set's reader.
COMPUTING = """
import experiments

def main(argv):
    experiments.require_backend()
    import keras
    from experiments import data
    keras.ops.zeros(3) + 1
    try:
        data._leave_accelerators_to_keras()
    except ModuleNotFoundError:
        pass  # an environment without TensorFlow

experiments.launch(main)
"""

# 256 TiB, more than a process can address.
GREEDY = """
import experiments

def main(argv):
    import keras
    keras.ops.zeros((2**46,), "float32")

experiments.launch(main)
"""


def run_program(program, *flags):
    return subprocess.run(
        [sys.executable, "-c", program, *flags], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "flags, shown", [([], False), (["--verbosity=0"], True)]
)
def test_progress_notes_of_libraries_are_shown_on_demand(flags, shown):
    done = run_program(PROGRAM, *flags)
    assert done.returncode == 0
    assert ("a progress note" in done.stderr) == shown


def test_nothing_precedes_what_a_program_says():
    """TensorFlow 2.21 has native lines for every process that imports it."""
    done = run_program(COMPUTING)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "train",
            "every setting is a flag. Received: 'train'; --help lists the "
            "flags",
        ),
        (
            "--no_such_flag=3",
            "Unknown command line flag 'no_such_flag' (--help lists the flags)",
        ),
    ],
)
def test_what_is_no_flag_is_one_line(argument, message):
    done = run_program(PROGRAM, argument)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"


def test_a_lack_of_memory_is_one_line():
    """The backend's own error, of the CPU; a GPU's has the same words."""
    done = run_program(GREEDY)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: no memory is left (")
    assert "Traceback" not in done.stderr


def test_an_interruption_that_was_swallowed_is_not_lost():
    done = run_program(SWALLOWING)
    assert done.returncode == 130
    assert done.stdout == "going on\n"
    assert done.stderr == "interrupted: give the same command again\n"


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_program_that_a_signal_ended_says_so(name, code):
    done = run_program(SIGNALLED.format(name))
    assert done.returncode == code
    assert done.stderr == "interrupted: give the same command again\n"


@pytest.mark.parametrize(
    "then",
    [
        "experiments.raise_if_interrupted()",
        "os.kill(os.getpid(), signal.SIGINT)",
    ],
)
def test_a_deferred_interruption(then):
    done = run_program(DEFERRING.format(then))
    assert done.returncode == 143
    assert done.stdout == "finishing\n"
    assert done.stderr == "interrupted: give the same command again\n"

"""What every program shares, in a process of its own as absl ends it."""

import subprocess
import sys

import pytest

PROGRAM = (
    "import experiments; from absl import logging; "
    "experiments.launch(lambda argv: logging.info('a progress note'))"
)


@pytest.mark.parametrize(
    "flags, shown", [([], False), (["--verbosity=0"], True)]
)
def test_progress_notes_of_libraries_are_shown_on_demand(flags, shown):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("a progress note" in done.stderr) == shown


def test_a_word_that_is_no_flag_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: every setting is a flag. Received: 'train'; "
        "--help lists the flags\n"
    )

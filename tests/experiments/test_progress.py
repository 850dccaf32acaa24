"""Where there is no terminal, lines say how far a program is."""

import io
import re
import sys
import threading

import pytest

from experiments import data
from experiments import many_runs
from experiments import progress
from experiments import train
from experiments.run_settings import Settings
from tests.waiting import LIMIT


class _Lines(io.StringIO):
    """Standard error of a process that has no terminal; tells of a line."""

    def __init__(self, wanted):
        super().__init__()
        self._wanted = wanted
        self.said = threading.Event()

    def write(self, text):
        count = super().write(text)
        if self._wanted in self.getvalue():
            self.said.set()
        return count


@pytest.fixture
def listen(monkeypatch):
    """Returns standard error that waits for a text, given the text."""
    monkeypatch.setattr(progress, "SECONDS", 0.001)

    def to(wanted):
        lines = _Lines(wanted)
        monkeypatch.setattr(sys, "stderr", lines)
        return lines

    return to


def test_a_line_says_how_far_it_is(listen):
    lines = listen(" left\n")
    with progress.bar("learning", 8, " steps", initial=2) as bar:
        bar.set_postfix(accuracy=0.5, refresh=False)
        bar.update(5)
        assert lines.said.wait(LIMIT)
    assert re.search(
        r"^learning: 7 of 8 steps \(88%\), accuracy=0.5, \d\d:\d\d left$",
        lines.getvalue(),
        re.MULTILINE,
    )
    # Closed, it says nothing more; and the lines are no terminal's.
    assert not progress._open
    assert "\r" not in lines.getvalue()
    assert not lines.getvalue().endswith("\n\n")


def test_before_the_first_step_there_is_no_time_left(listen):
    lines = listen("\n")
    with progress.bar("learning", 8, " steps", initial=2):
        assert lines.said.wait(LIMIT)
    assert lines.getvalue().startswith("learning: 2 of 8 steps (25%)\n")


def test_bars_within_a_bar_are_one_line(listen):
    lines = listen(" left; all: 0 of 8 steps (0%)\n")
    with progress.bar("all", 8, " steps"):
        with progress.bar("one", 4, " steps", leave=False) as bar:
            bar.update()
            assert lines.said.wait(LIMIT)
        again = listen("\n")
        assert again.said.wait(LIMIT)
    assert "one: 1 of 4 steps (25%), " in lines.getvalue()
    assert again.getvalue().startswith("all: 0 of 8 steps (0%)\n")


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bar("learning", 4, " steps", file=terminal) as bar:
        bar.update(2)
    assert "learning:  50%|" in terminal.getvalue()


def test_runs_say_how_far_they_are(listen, tmp_path, monkeypatch):
    """Those of a grid: the run's step and accuracy, and all runs' steps."""
    lines = listen("condition 0, seed 0: 1 of 2 steps (50%), ")
    digits = data.load("digits")
    take = train.training.Training._take_steps

    def waiting(training, until):
        if training._step == 1:
            lines.said.wait(LIMIT)
        take(training, until)

    monkeypatch.setattr(train.training.Training, "_take_steps", waiting)
    settings = Settings(0, steps=2, batch_size=4)
    many_runs.train_all({tmp_path: [settings]}, digits)
    line = next(x for x in lines.getvalue().splitlines() if "1 of 2" in x)
    # Of the training step; the order is the backend's.
    assert re.search(r"\(50%\).*, accuracy=[\d.]+", line)
    assert "left; all 1 runs: 1 of 2 steps (50%)" in line

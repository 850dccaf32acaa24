"""Writes a run's folder, `<results>/<condition>/<seed>/`.

    run.json          what made the run: settings, data, versions, revision
    metrics.jsonl     a line per evaluation: step (training steps done),
                      train_loss and train_accuracy (means since the last
                      line), test_loss and test_accuracy (whole test set)
    timing.jsonl      a line per evaluation: step, train_seconds (since the
                      last line; the first ones include compilation),
                      eval_seconds, images_per_second
    tensorboard/      the same metrics as TensorBoard logs
    checkpoint.npz    what to go on from, and previous.checkpoint.npz the one
                      before it, until the run is finished
    final.weights.h5  the trained weights; there once the run is finished
    recalibrated.json what recalibration makes of them, see `recalibrated`
    lock              held by the process that trains

The lines are JSON objects. Those of metrics.jsonl depend on run.json alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from experiments import ExperimentError
from experiments import atomic
from experiments import checkpoint
from experiments import result_files
from experiments import same_settings
from experiments.checkpoint import Position

if TYPE_CHECKING:
    import keras

# Writing a checkpoint is followed by training for so many times as long, so
# that a fast machine does not spend its time in writing them.
_CHECKPOINT_SPACING = 50


class BusyError(ExperimentError):
    """Another process trains this run; the message is one line."""


class RunFolder:
    """The folder of one run.

    Making this object writes nothing; `resume` begins the run.

    Args:
        path: the folder.
        description: the content of run.json.

    Raises:
        ExperimentError: the folder holds a run of another description, or
            files that are damaged or of which nothing says what made them.
    """

    def __init__(self, path: Path, description: dict):
        self.path = path
        self._description = description
        self._facts = path / "run.json"
        self._checkpoint = path / "checkpoint.npz"
        self._weights = path / "final.weights.h5"
        self._metrics = path / "metrics.jsonl"
        self._timing = path / "timing.jsonl"
        self._lock = path / "lock"
        self._board = None
        self._saved = 0
        self._next_checkpoint = 0.0
        self._examine()

    def _examine(self):
        """Finds damage now rather than hours into a grid of runs."""
        if os.path.exists(self._facts):
            facts = result_files.read_facts(self._facts)
            same_settings.require_settings(self.path, facts, self._description)
            self.metrics()
            self._read(result_files.read_timing)
        else:
            self._require_empty()

    @property
    def finished(self) -> bool:
        return result_files.has_weights(self.path)

    @property
    def stripped(self) -> bool:
        """Whether all lines are there, and the weights were taken away.

        So are results that were kept without them. A killed run of more than
        one line has a checkpoint.
        """
        lines = self.metrics()
        return (
            not self.finished
            and len(lines) > 1
            and lines[-1]["step"] == self._description["steps"]
            and checkpoint.newest(self._checkpoint) is None
        )

    def check_checkpoint(self) -> None:
        """Finds out whether the checkpoint to go on from is whole, if any is.

        Raises:
            ExperimentError: it is damaged, or cannot be read.
        """
        path = checkpoint.newest(self._checkpoint)
        if path and not self.finished:
            checkpoint.check(path)

    @property
    def saved(self) -> int:
        """The steps that were done at the last checkpoint."""
        return self._saved

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training this run.

        The system gives the lock back when this process ends, however it
        does: a `kill -9` leaves none behind.

        Raises:
            BusyError: another process trains it.
            ExperimentError: as on making this object; the folder may have
                been begun since then.
            OSError: the folder cannot be written to.
        """
        atomic.make_folder(self.path)
        # A soft lock would outlive a killed process.
        lock = filelock.FileLock(
            self._lock, blocking=False, fallback_to_soft=False
        )
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise BusyError(
                f"another process trains {self.path}: wait for it to end, or "
                "give another output"
            ) from error
        try:
            self._examine()
            yield
        finally:
            # While it is held: who waits for it sees that it is gone. Windows
            # deletes no open file; there filelock does when it releases it.
            with contextlib.suppress(PermissionError):
                self._lock.unlink(missing_ok=True)
            lock.release()

    def _require_empty(self):
        for path in (
            self._weights,
            self._checkpoint,
            self._metrics,
            self._timing,
        ):
            if os.path.exists(path):
                raise ExperimentError(
                    f"{self.path} has {path.name} but no {self._facts.name} "
                    "that says what made it: give another output, or delete "
                    "the folder"
                )

    def _write_facts(self, step):
        """Says what makes the run, from `step` on if it was begun earlier."""
        facts = self._description
        if self._facts.exists():
            facts = result_files.read_facts(self._facts)
            now = {
                name: self._description[name]
                for name in same_settings.CIRCUMSTANCES
            }
            last = [facts, *facts.get("continued_by", [])][-1]
            if all(last.get(name) == now[name] for name in now):
                return
            facts.setdefault("continued_by", []).append({"step": step, **now})
            of_onednn = last.get("onednn"), now["onednn"]
            if step and set(of_onednn) == {True, False}:
                before, after = ("on" if x else "off" for x in of_onednn)
                print(
                    f"{self.path}: trained with oneDNN {before} to step "
                    f"{step} and goes on with oneDNN {after}, which rounds "
                    "differently; set TF_ENABLE_ONEDNN_OPTS to choose",
                    file=sys.stderr,
                )
        atomic.write_text(self._facts, json.dumps(facts, indent=2) + "\n")

    def resume(self, model: keras.Model) -> Position:
        """Begins the run, or gives a model the state of its checkpoint.

        Lines and logs after the checkpoint are cut.

        Returns:
            How far the run is.

        Raises:
            ExperimentError: a file cannot be read or written, or ends before
                the checkpoint, or the checkpoint cannot be used.
        """
        position = Position(0, 0)
        path = checkpoint.newest(self._checkpoint)
        if path:
            position = checkpoint.restore(path, model, self._description)
        step = position.recorded
        kept = {
            path: [line for line in self._read(read) if line["step"] <= step]
            for path, read in (
                (self._metrics, result_files.read_metrics),
                (self._timing, result_files.read_timing),
            )
        }
        for path, lines in kept.items():
            last = lines[-1]["step"] if lines else 0
            if last != step:
                raise ExperimentError(
                    f"{path} has no line of step {step}, where the run is to "
                    "go on: delete its folder to begin the run anew"
                )
        self.remove_leftovers()
        self._write_facts(position.step)
        for path, lines in kept.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            atomic.write_text(path, text)
        self._board = _tensorboard(self.path / "tensorboard", self.metrics())
        self._saved = position.step
        return position

    def remove_leftovers(self) -> None:
        """Deletes what a killed process was writing; this one has the lock."""
        for pattern in ("incomplete.*", ".*.json*.*"):
            for leftover in self.path.glob(pattern):
                leftover.unlink()

    def metrics(self) -> list[dict]:
        """Returns the lines of metrics.jsonl.

        Raises:
            ExperimentError: they are damaged, or a finished run's are not
                all there.
        """
        return self._read(result_files.read_metrics)

    def _read(self, read):
        # What an interruption cut short, training goes on from.
        return read(
            self.path, self._description["steps"], drop_torn=not self.finished
        )

    def record(self, metrics: dict, timing: dict, model: keras.Model) -> None:
        """Adds a line to each file; both have "step".

        A checkpoint is written too, unless the last one is so recent that
        this would slow the training down.
        """
        for path, line in ((self._metrics, metrics), (self._timing, timing)):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        _log(self._board, metrics)
        if time.monotonic() >= self._next_checkpoint:
            step = metrics["step"]
            self.save(model, Position(step, recorded=step))

    def save(self, model: keras.Model, position: Position) -> None:
        """Writes a checkpoint; the one before it is kept."""
        began = time.monotonic()
        self._lines_to_disk()
        checkpoint.save(self._checkpoint, model, position, self._description)
        now = time.monotonic()
        self._saved = position.step
        self._next_checkpoint = now + _CHECKPOINT_SPACING * (now - began)

    def finish(self, network: keras.Model) -> None:
        """Writes the weights, in whose presence the run is finished.

        Args:
            network: not compiled, for else the optimizer's variables, twice
                the size, would be written with the weights.
        """
        self._lines_to_disk()
        with atomic.replacing(self._weights) as path:
            network.save_weights(path)
        self.tidy()

    def load_weights(self, network: keras.Model) -> None:
        """Gives a network, not compiled, the trained weights.

        Raises:
            ExperimentError: they cannot be read.
        """
        try:
            network.load_weights(self._weights)
        except Exception as error:  # h5py's and Keras's own
            raise ExperimentError(
                f"{self._weights} cannot be read: delete its folder to train "
                "the run anew"
            ) from error

    def discard_weights(self) -> None:
        """Deletes the trained weights: what the run was for is kept."""
        self._weights.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Deletes what a finished run needs no more, where that is allowed."""
        with contextlib.suppress(OSError):
            checkpoint.previous(self._checkpoint).unlink(missing_ok=True)
            self._checkpoint.unlink(missing_ok=True)
        # The file that a killed process left; not one that is being held.
        if self._lock.exists():
            with contextlib.suppress(OSError, BusyError), self.locked():
                pass

    def _lines_to_disk(self):
        # A checkpoint must not outlive the lines that were before it.
        for path in (self._metrics, self._timing):
            atomic.to_disk(path)

    def close(self) -> None:
        """Ends the TensorBoard logs."""
        if self._board:
            self._board.close()


def _tensorboard(folder, metrics):
    """Returns a writer of TensorBoard logs that has `metrics`, or None."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        print("TensorBoard is absent: no logs for it", file=sys.stderr)
        return None
    # Begun anew: what an interrupted run logged after its checkpoint goes.
    shutil.rmtree(folder, ignore_errors=True)
    writer = Writer(str(folder))
    for line in metrics:
        _log(writer, line)
    return writer


def _log(writer, line):
    if writer:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, step=line["step"])

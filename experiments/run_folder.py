"""Writes a run's folder, `<results>/<condition>/<seed>/`.

    run.json          what made the run: settings, data, versions, revision
    metrics.jsonl     a line per evaluation: step (training steps done),
                      train_loss and train_accuracy (means since the last
                      line), test_loss and test_accuracy (whole test set)
    timing.jsonl      a line per evaluation: step, train_seconds (since the
                      last line; the first ones include compilation),
                      eval_seconds, images_per_second
    tensorboard/      the same metrics as TensorBoard logs
    checkpoint.npz    the state at the last line, until the run is finished
    final.weights.h5  the trained weights; there once the run is finished

The lines are JSON objects. Those of metrics.jsonl depend on run.json alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments import ExperimentError
from experiments import atomic
from experiments import result_files

if TYPE_CHECKING:
    import keras


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
        self._board = None
        if os.path.exists(self._facts):
            facts = result_files.read_facts(self._facts)
            self._require_same({**result_files.BEFORE, **facts})
            # Damage is found now rather than hours into a grid of runs.
            self.metrics()
            self._read(result_files.read_timing)
        else:
            self._require_empty()

    @property
    def finished(self) -> bool:
        return result_files.has_weights(self.path)

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

    def _require_same(self, facts):
        differing = [
            f"{name}={facts.get(name)} there, {value} now"
            for name, value in self._description.items()
            if name not in result_files.CIRCUMSTANCES
            and facts.get(name) != value
        ]
        if differing:
            raise ExperimentError(
                f"{self.path} holds a run of other settings "
                f"({'; '.join(differing)}): give those settings or another "
                "output, or delete the folder"
            )

    def _write_facts(self):
        """Says what makes the run, from now on if it was begun earlier."""
        facts = self._description
        if self._facts.exists():
            facts = result_files.read_facts(self._facts)
            now = {
                name: self._description[name]
                for name in result_files.CIRCUMSTANCES
            }
            last = [facts, *facts.get("continued_by", [])][-1]
            if all(last.get(name) == now[name] for name in now):
                return
            facts.setdefault("continued_by", []).append(now)
        atomic.write_text(self._facts, json.dumps(facts, indent=2) + "\n")

    def resume(self, model: keras.Model) -> int:
        """Begins the run, or gives a model the state of its checkpoint.

        Lines and logs after the checkpoint are cut.

        Returns:
            The number of training steps done.

        Raises:
            ExperimentError: a file cannot be read or written, or ends before
                the checkpoint.
        """
        step = 0
        if self._checkpoint.exists():
            step = restore(self._checkpoint, model)
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
        self._write_facts()
        for path, lines in kept.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            atomic.write_text(path, text)
        self._board = _tensorboard(self.path / "tensorboard", self.metrics())
        return step

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
        """Adds a line to each file and a checkpoint; both have "step"."""
        for path, line in ((self._metrics, metrics), (self._timing, timing)):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        _log(self._board, metrics)
        save(self._checkpoint, model, metrics["step"])

    def finish(self, network: keras.Model) -> None:
        """Writes the weights, in whose presence the run is finished.

        Args:
            network: not compiled, for else the optimizer's variables, twice
                the size, would be written with the weights.
        """
        with _replacing(self._weights) as path:
            network.save_weights(path)
        self._checkpoint.unlink()

    def close(self) -> None:
        """Ends the TensorBoard logs."""
        if self._board:
            self._board.close()


def save(path: Path, model: keras.Model, step: int) -> None:
    """Writes a checkpoint: all of the model's and the optimizer's state.

    Args:
        path: file to write, whole or not at all.
        model: a compiled model.
        step: number of training steps done.
    """
    import keras

    values = {
        f"variable_{number}": keras.ops.convert_to_numpy(variable)
        for number, variable in enumerate(state(model))
    }
    with _replacing(path) as incomplete, open(incomplete, "wb") as file:
        np.savez(file, step=step, **values)


def restore(path: Path, model: keras.Model) -> int:
    """Gives a compiled model the state of a checkpoint; returns its step.

    Raises:
        ExperimentError: the file is not a checkpoint of such a model.
    """
    try:
        with np.load(path) as saved:
            variables = state(model)
            if len(saved.files) != len(variables) + 1:
                raise ValueError("another number of variables")
            for number, variable in enumerate(variables):
                variable.assign(saved[f"variable_{number}"])
            return int(saved["step"])
    except Exception as error:  # zipfile's, NumPy's and the backend's own
        raise _unreadable(path) from error


def state(model: keras.Model) -> list[keras.Variable]:
    """Returns all variables of a compiled model and of its optimizer."""
    model.optimizer.build(model.trainable_variables)
    # model.variables has what a .keras file leaves out: the state of
    # dropout's random generator.
    return [*model.variables, *model.optimizer.variables]


def _unreadable(path):
    return ExperimentError(
        f"{path} cannot be read: delete its folder to begin the run anew"
    )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; on success, what is there becomes `path`."""
    incomplete = path.with_name(f"incomplete.{path.name}")
    try:
        yield incomplete
        os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


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

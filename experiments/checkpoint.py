"""Checkpoints: all that an interrupted run needs to go on, in one file.

    variable_0, ...  the model's and the optimizer's variables, among them
                     moving statistics and the state of dropout's generator,
                     which a .keras file leaves out
    step             training steps done; with the settings it says which
                     batch is next
    about            JSON: the rest of the `Position`, and the run's settings

The file is a NumPy .npz, whose parts have a checksum each. A newer checkpoint
takes its place only once that is whole and on the disk, and the one before is
kept under another name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments import ExperimentError
from experiments import atomic
from experiments import same_settings

if TYPE_CHECKING:
    import keras


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        step: training steps done.
        recorded: steps that were done at the last line of metrics.jsonl.
        images: images trained on since then.
        sums: over those images, of what a step reports; exact.
        train_seconds: time spent in those steps.
    """

    step: int
    recorded: int
    images: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    train_seconds: float = 0.0


def save(
    path: Path, model: keras.Model, position: Position, description: dict
) -> None:
    """Writes a checkpoint; the one that is there becomes `previous(path)`.

    Args:
        path: file to write, whole or not at all.
        model: a compiled model.
        position: how far it is.
        description: the content of run.json.

    Raises:
        OSError: it cannot be written; the one that is there stays.
    """
    import keras

    values = {
        f"variable_{number}": keras.ops.convert_to_numpy(variable)
        for number, variable in enumerate(state(model))
    }
    about = {**dataclasses.asdict(position), "run": description}
    with atomic.replacing(path) as incomplete:
        with open(incomplete, "wb") as file:
            np.savez(
                file, step=position.step, about=json.dumps(about), **values
            )
        atomic.to_disk(incomplete)
        if path.exists():
            os.replace(path, previous(path))


def previous(path: Path) -> Path:
    """Where the checkpoint before that of a path is kept."""
    return path.with_name(f"previous.{path.name}")


def newest(path: Path) -> Path | None:
    """Returns the newest checkpoint that was written there; None if none."""
    # `path` is missing for the moment in which `save` renames.
    for candidate in (path, previous(path)):
        if os.path.exists(candidate):
            return candidate
    return None


def check(path: Path) -> None:
    """Finds out whether a checkpoint is whole, without reading it in.

    Raises:
        ExperimentError: it is damaged, or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            whole = file.testzip() is None
    except FileNotFoundError:
        return  # the process that trains has just written another
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}"
        ) from error
    except Exception as error:  # zipfile's and zlib's own
        raise _unusable(path, "is damaged") from error
    if not whole:
        raise _unusable(path, "is damaged")


def restore(path: Path, model: keras.Model, description: dict) -> Position:
    """Gives a compiled model the state of a checkpoint.

    Args:
        path: the file.
        model: a compiled model; on an error it keeps its state.
        description: the content of run.json.

    Raises:
        ExperimentError: the file is damaged, or of another run or model.
    """
    try:
        with np.load(path) as saved:
            values = {name: saved[name] for name in saved.files}
        step = int(values.pop("step"))
        # Older ones were written after a line alone, and do not say whose.
        about = {"step": step, "recorded": step, "run": {}}
        if "about" in values:
            about = json.loads(str(values.pop("about")))
        there = about.pop("run")
        position = Position(**about)
    except Exception as error:  # zipfile's, NumPy's and JSON's own
        raise _unusable(path, "is damaged") from error
    differing = there and same_settings.differences(there, description)
    if differing:
        raise _unusable(path, f"is of another run ({differing})")
    variables = state(model)
    shapes = {
        f"variable_{number}": tuple(variable.shape)
        for number, variable in enumerate(variables)
    }
    if shapes != {name: value.shape for name, value in values.items()}:
        raise _unusable(path, "is of another model")
    for name, variable in zip(shapes, variables):
        variable.assign(values[name])
    return position


def state(model: keras.Model) -> list[keras.Variable]:
    """Returns all variables of a compiled model and of its optimizer."""
    model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]


def _unusable(path, reason):
    advice = "delete its folder to begin the run anew"
    if previous(path).exists():
        advice = "delete it to go on from the checkpoint before it"
    return ExperimentError(f"{path} {reason}: {advice}")

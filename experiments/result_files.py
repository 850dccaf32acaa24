"""Reads what training left behind: `<results>/<condition>/<seed>/`."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import ExperimentError
from experiments import article

# What all runs of one report must have in common: accuracies measured under
# different ones of these do not belong in one figure. `steps` is not among
# them, for a table that names each step stays true.
SETTINGS = (
    "dataset",
    "dataset_version",
    "dataset_copy",
    "input",
    "shuffle",
    "layer",
    "optimizer",
    "optimizer_epsilon",
    "learning_rate",
    "batch_size",
    "eval_every",
    "backend",
)
# What may differ from run to run, but is then said.
CIRCUMSTANCES = ("device", "packages", "revision")


@dataclasses.dataclass(frozen=True)
class Run:
    """One condition trained from one seed, as far as it has come.

    Attributes:
        condition: the `article.Condition`.
        seed: int.
        facts: `run.json`, what made the run.
        steps: int array, training steps at which it was evaluated.
        accuracies: float array of the same length, test accuracy, 0 to 1.
        train_seconds: time spent in training steps, or None if not kept.
        images_per_second: median over the stretches between evaluations, or
            None.
    """

    condition: article.Condition
    seed: int
    facts: dict
    steps: np.ndarray
    accuracies: np.ndarray
    train_seconds: float | None
    images_per_second: float | None

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def finished(self) -> bool:
        return self.last_step >= self.facts["steps"]


def read_runs(results_dir: Path | str) -> list[Run]:
    """Reads every run below a folder of results.

    Args:
        results_dir: folder with `<condition>/<seed>/run.json`, and
            `metrics.jsonl` and `timing.jsonl` beside it, both optional for a
            run that has only begun.

    Returns:
        The runs, by condition and seed.

    Raises:
        ExperimentError: there are none, a file is damaged (its name and the
            line are given), or two runs were made with different settings.
    """
    results_dir = Path(results_dir)
    if not results_dir.is_dir():
        raise ExperimentError(
            "the folder of results does not exist; give the one that "
            f"training wrote. Received: results={results_dir}"
        )
    paths = list(results_dir.glob("*/*/run.json"))
    if not paths:
        raise ExperimentError(
            f"no results in {results_dir}: train a condition first "
            "(python -m experiments.train), or give another folder"
        )
    runs = sorted(
        (_read_run(path) for path in paths),
        key=lambda run: (run.condition.number, run.seed),
    )
    _require_same_settings(runs)
    return runs


def differing_circumstances(runs: Sequence[Run]) -> list[str]:
    """Says, one sentence each, what else differs between the runs."""
    sentences = []
    for name in CIRCUMSTANCES:
        values = []
        for run in runs:
            # An interrupted run may have been continued elsewhere.
            for facts in (run.facts, *run.facts.get("continued_by", [])):
                if facts.get(name) not in values:
                    values.append(facts.get(name))
        if len(values) > 1:
            sentences.append(
                f"The runs differ in {name}: "
                + "; ".join(describe(value) for value in values)
                + "."
            )
    return sentences


def describe(value: object) -> str:
    """A value of `run.json` as a reader would write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not recorded" if value is None else str(value)


def _require_same_settings(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name in SETTINGS:
            one, other = first.facts.get(name), run.facts.get(name)
            if one != other:
                raise ExperimentError(
                    f"the results differ in {name}: {describe(one)} in "
                    f"{_folder(first)}, {describe(other)} in {_folder(run)}; "
                    "keep each setting's results in a folder of their own"
                )


def _folder(run: Run) -> str:
    return f"{run.condition.number}/{run.seed}"


def _damaged(path: Path, line: int, reason: str) -> ExperimentError:
    return ExperimentError(
        f"{path}, line {line}: {reason}; repair or delete that run's folder"
    )


def _parse(path: Path, text: str, line: int = 1) -> dict:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        # A file of many lines counts its own; a line stands where it is.
        line += error.lineno - 1
        raise _damaged(path, line, f"not JSON ({error.msg})") from error
    if not isinstance(parsed, dict):
        raise _damaged(path, line, "not a JSON object")
    return parsed


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _damaged(path, line, "not UTF-8 text") from error
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}"
        ) from error


def _read_lines(path: Path, *keys: str) -> list[dict]:
    """Reads JSON lines, each an object with finite numbers under `keys`."""
    if not path.exists():
        return []
    rows = []
    for number, text in enumerate(_read_text(path).splitlines(), start=1):
        row = _parse(path, text, number)
        for key in keys:
            value = row.get(key)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise _damaged(
                    path, number, f"{key} is not a number: {value!r}"
                )
        if rows and row["step"] <= rows[-1]["step"]:
            raise _damaged(
                path, number, f"step {row['step']} after {rows[-1]['step']}"
            )
        rows.append(row)
    return rows


def _read_run(path: Path) -> Run:
    facts = _parse(path, _read_text(path))
    for key in ("condition", "seed", "steps", "dataset"):
        if key not in facts:
            raise _damaged(path, 1, f"{key} is missing")
    folder = path.parent
    named = f"{facts['condition']}/{facts['seed']}"
    if f"{folder.parent.name}/{folder.name}" != named:
        raise ExperimentError(
            f"{path} is of condition and seed {named}; move its folder to "
            "that name"
        )
    metrics = _read_lines(folder / "metrics.jsonl", "step", "test_accuracy")
    timing = _read_lines(
        folder / "timing.jsonl", "step", "train_seconds", "images_per_second"
    )
    speeds = [row["images_per_second"] for row in timing]
    return Run(
        condition=article.condition(facts["condition"]),
        seed=facts["seed"],
        facts=facts,
        steps=np.array([row["step"] for row in metrics], int),
        accuracies=np.array([row["test_accuracy"] for row in metrics], float),
        train_seconds=sum(row["train_seconds"] for row in timing) or None,
        images_per_second=float(np.median(speeds)) if speeds else None,
    )

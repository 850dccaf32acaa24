"""Which settings runs have in common, and where they differ.

Compares what `run.json` says of runs, see `result_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import ExperimentError

if TYPE_CHECKING:
    from experiments.result_files import Run

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
    "placement",
    "optimizer",
    "optimizer_epsilon",
    "learning_rate",
    "batch_size",
    "eval_every",
    "backend",
    "distribution",
    "replicas",
    "synchronized",
)
# What may differ from run to run, but is then said.
CIRCUMSTANCES = (
    "device",
    "processor",
    "cores",
    "onednn",
    "packages",
    "revision",
)
# What runs were that say nothing of it: there was no choice yet.
BEFORE = {
    "distribution": "none",
    "replicas": 1,
    "synchronized": False,
    "placement": "after",
}


def differences(there: dict, now: dict) -> str:
    """Says in which settings two descriptions of runs differ.

    Args:
        there: from a file, which may be older than some settings.
        now: what `train.describe` returns.

    Returns:
        A text; empty if they differ in circumstances alone.
    """
    there = {**BEFORE, **there}
    return "; ".join(
        f"{name}={there.get(name)} there, {value} now"
        for name, value in now.items()
        if name not in CIRCUMSTANCES and there.get(name) != value
    )


def require_settings(folder: Path, there: dict, now: dict) -> None:
    """Finds out whether a folder's results are of the same settings.

    Raises:
        ExperimentError: they are not, as `differences` says.
    """
    differing = differences(there, now)
    if differing:
        raise ExperimentError(
            f"{folder} holds results of other settings ({differing}): give "
            "those settings or another output, or delete the folder"
        )


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


def require_same_settings(
    runs: Sequence[dict], names: Sequence[str] = SETTINGS
) -> None:
    """Compares what is, or is to be, in the run.json of some runs.

    Raises:
        ExperimentError: they differ in one of `names`.
    """
    first = runs[0]
    for facts in runs[1:]:
        for name in names:
            one, other = first.get(name), facts.get(name)
            if one != other:
                raise ExperimentError(
                    f"the results differ in {name}: {describe(one)} in "
                    f"{folder_of(first)}, {describe(other)} in "
                    f"{folder_of(facts)}; keep each setting's results in a "
                    "folder of their own"
                )


def folder_of(facts: dict) -> str:
    """The folder of a run of the article, below that of all results."""
    return f"{facts['condition']}/{facts['seed']}"

"""What a report says of runs, and what the article published beside it."""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import ExperimentError
from experiments import article
from experiments import result_files
from experiments.result_files import Run

# A run is smoothed where the smoothing covers at most a tenth of it.
LEAST_POINTS_TO_SMOOTH = 10 * article.SMOOTHING_POINTS
_PUBLISHED_HALF_WINDOW = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """One condition over its seeds.

    Attributes:
        condition: the `article.Condition`.
        runs: those averaged: of the finished ones those of the most steps,
            or where none is finished those that are at least half as far as
            the one that is furthest.
        unfinished: runs of the condition that are not finished, averaged or
            not.
        shorter: finished runs of fewer steps, which are not averaged.
        steps: int array, the steps at which all of `runs` were evaluated.
        accuracies: test accuracy, 0 to 1, shaped (runs, steps).
    """

    condition: article.Condition
    runs: tuple[Run, ...]
    unfinished: tuple[Run, ...]
    shorter: tuple[Run, ...]
    steps: np.ndarray
    accuracies: np.ndarray

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def smoothed(self) -> bool:
        """Whether there are points enough to average over 10."""
        return len(self.steps) >= LEAST_POINTS_TO_SMOOTH

    def final(self) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds, at the end.

        Of each run the mean of the last 10 points, or the last point where
        the run is not smoothed. One seed has no standard deviation.
        """
        points = article.SMOOTHING_POINTS if self.smoothed else 1
        ends = self.accuracies[:, -points:].mean(axis=1)
        spread = float(ends.std(ddof=1)) if len(ends) > 1 else None
        return float(ends.mean()), spread

    def moving_and_recalibrated(self) -> list[tuple[float, float]]:
        """Accuracies at the end with either statistics, of runs with both."""
        return [
            (float(run.accuracies[-1]), run.recalibrated)
            for run in self.runs
            if run.recalibrated is not None
        ]

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, and mean and standard deviation over the seeds there.

        Smoothed over 10 points where there are enough of them: each point
        drawn is a mean over 10, at the mean of their steps. The standard
        deviation is 0 for one seed.
        """
        steps, accuracies = self.steps.astype(float), self.accuracies
        if self.smoothed:
            steps = smooth(steps)
            accuracies = np.stack([smooth(row) for row in accuracies])
        spread = np.zeros_like(steps)
        if len(accuracies) > 1:
            spread = accuracies.std(axis=0, ddof=1)
        return steps, accuracies.mean(axis=0), spread


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over each 10 values in a row; 9 fewer than came in."""
    points = article.SMOOTHING_POINTS
    return np.convolve(values, np.full(points, 1 / points), mode="valid")


def summarize(runs: Sequence[Run]) -> dict[int, Summary]:
    """Gathers runs by condition; those with no evaluation yet are left out.

    Args:
        runs: what `result_files.read_runs` returns.

    Returns:
        Condition number -> `Summary`, in the order of the numbers.
    """
    summaries = {}
    for number in sorted({run.condition.number for run in runs}):
        own = [run for run in runs if run.condition.number == number]
        unfinished = tuple(run for run in own if not run.finished)
        finished = [run for run in own if run.finished]
        most = max((run.last_step for run in finished), default=0)
        averaged = [run for run in finished if run.last_step == most]
        if not finished:
            half = max(run.last_step for run in own) / 2
            averaged = [r for r in own if len(r.steps) and r.last_step >= half]
        if not averaged:
            continue
        steps = averaged[0].steps
        for run in averaged[1:]:
            steps = np.intersect1d(steps, run.steps)
        if not len(steps):
            # Shorter than one interval of evaluation, each to its own end.
            averaged = [max(averaged, key=lambda run: run.last_step)]
            steps = averaged[0].steps
        summaries[number] = Summary(
            condition=averaged[0].condition,
            runs=tuple(averaged),
            unfinished=unfinished,
            shorter=tuple(r for r in finished if r.last_step < most),
            steps=steps,
            accuracies=np.stack(
                [r.accuracies[np.isin(r.steps, steps)] for r in averaged]
            ),
        )
    return summaries


def read_published_curves(path: Path | str) -> dict[int, np.ndarray]:
    """Reads the measurements behind the article's figures.

    Args:
        path: CSV file with the columns condition, step and test_accuracy.

    Returns:
        Condition number -> float array of (step, accuracy) rows by step.

    Raises:
        ExperimentError: the file cannot be read or is no such table, or has
            too few rows of a condition to be smoothed.
    """
    curves = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                try:
                    point = (int(row["step"]), float(row["test_accuracy"]))
                    number = int(row["condition"])
                    if point[0] not in range(sys.maxsize):
                        raise ValueError("no number of steps")
                    if not 0 <= point[1] <= 1:  # nor is NaN
                        raise ValueError("no accuracy")
                except (KeyError, TypeError, ValueError) as error:
                    raise ExperimentError(
                        f"{path}, line {reader.line_num}: not a row of "
                        "condition, step and test_accuracy; give the csv of "
                        "the article's curves"
                    ) from error
                curves.setdefault(number, []).append(point)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a table in text"
        raise ExperimentError(
            f"cannot read published_curves={path}: {reason}"
        ) from error
    if not curves:
        raise ExperimentError(f"published_curves={path} has no rows")
    for number, points in curves.items():
        if len(points) < article.SMOOTHING_POINTS:
            raise ExperimentError(
                f"published_curves={path} has {len(points)} of the "
                f"{article.SMOOTHING_POINTS} rows or more that condition "
                f"{number} needs; give the csv of the article's curves"
            )
    return {
        number: np.array(sorted(points), float)
        for number, points in curves.items()
    }


def published_at(
    number: int, step: int, curves: dict[int, np.ndarray] | None
) -> tuple[float, int] | None:
    """What the article measured for a condition at a training step.

    Args:
        number: the condition.
        step: training steps done.
        curves: what `read_published_curves` returns, or None.

    Returns:
        The accuracy, and the step at which it stands. With curves, the mean
        of the 11 published points around the nearest one (fewer at the
        beginning, the last 11 at the end), at that one's step. Without, the
        value interpolated linearly between the steps of the article's
        table; before the first of them, the value there. None where the curves
        lack the condition.
    """
    if curves is None:
        at_step = article.PUBLISHED[number].at_step
        steps, accuracies = list(at_step), list(at_step.values())
        step = int(np.clip(step, steps[0], steps[-1]))
        return float(np.interp(step, steps, accuracies)), step
    if number not in curves:
        return None
    steps, accuracies = curves[number].T
    nearest = int(np.abs(steps - step).argmin())
    # As many on both sides where the curve rises, at its beginning.
    half = min(_PUBLISHED_HALF_WINDOW, nearest)
    stop = min(nearest + half + 1, len(steps))
    window = accuracies[max(0, stop - 2 * half - 1) : stop]
    return float(window.mean()), int(steps[nearest])


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a report is about.

    Attributes:
        runs: every run, by condition and seed; at least one.
        summaries: condition number -> its summary, where it has results.
        data: the data set, its version and copy, in words.
        compared: whether the article's values may stand beside these; only
            where both are measured on CIFAR-10.
        curves: the article's own curves, by condition number, or None.
    """

    runs: Sequence[Run]
    summaries: dict[int, Summary]
    data: str
    compared: bool
    curves: dict[int, np.ndarray] | None


def data_of(facts: dict) -> str:
    """The data set of a run.json, its version and copy, in words."""
    cifar10 = facts["dataset"] == "cifar10"
    words = ["CIFAR-10" if cifar10 else facts["dataset"]]
    if facts.get("dataset_version"):
        words.append(facts["dataset_version"])
    if facts.get("dataset_copy"):
        words.append(f"({facts['dataset_copy']})")
    return " ".join(words)


class NothingEvaluatedError(ExperimentError):
    """Runs have begun, and none has been evaluated; the message is one line."""


def read_contents(
    results_dir: Path | str, published_curves: Path | str | None
) -> Contents:
    """Reads a folder of results, and the article's curves if given.

    Raises:
        NothingEvaluatedError: there is nothing to report yet.
        ExperimentError: there are no runs, a file is damaged, or the runs
            were made with different settings.
    """
    runs = result_files.read_runs(results_dir)
    summaries = summarize(runs)
    if not summaries:
        raise NothingEvaluatedError(
            f"no run in {results_dir} has been evaluated yet; come back after "
            f"its first {runs[0].facts.get('eval_every', '')} steps"
        )
    curves = None
    if published_curves is not None:
        curves = read_published_curves(published_curves)
    facts = runs[0].facts
    compared = facts["dataset"] == "cifar10"
    return Contents(
        runs=runs,
        summaries=summaries,
        data=data_of(facts),
        compared=compared,
        curves=curves if compared else None,
    )

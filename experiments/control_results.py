"""What the control experiments have come to, from their result files.

A claim's difference, and its confidence interval over the seeds, makes the
sentence of the report.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import ExperimentError
from experiments import article
from experiments import comparison
from experiments import result_files
from experiments import same_settings
from experiments.comparison import Difference
from experiments.controls import ARTICLE
from experiments.controls import CONTROLS
from experiments.controls import FOLDER
from experiments.controls import Claim
from experiments.controls import Control
from experiments.controls import folder
from experiments.run_settings import Settings

# The evaluations at the end of a run whose mean is its accuracy: one alone is
# off by what the moving average happens to be.
LAST_EVALUATIONS = 5


@dataclasses.dataclass(frozen=True)
class Results:
    """What a control experiment has come to.

    Attributes:
        control: the `Control`.
        runs: finished ones; name of an arm -> list of `Run`.
        accuracies: (name of an arm, condition) -> {seed: accuracy}, see
            `LAST_EVALUATIONS`.
        recalibrated: the same with recalibrated statistics, of the last step
            alone; without batch normalization there is nothing to
            recalibrate, and it is the last evaluation.
    """

    control: Control
    runs: Mapping[str, Sequence[result_files.Run]]
    accuracies: Mapping[tuple[str, int], Mapping[int, float]]
    recalibrated: Mapping[tuple[str, int], Mapping[int, float]]

    def difference(self, claim: Claim) -> Difference | None:
        """What a claim comes to over the seeds that have all of it."""
        return _difference(claim, self.accuracies)

    def recalibrated_difference(self, claim: Claim) -> Difference | None:
        """The same with recalibrated statistics; None if there are none."""
        numbers = {number for _, number in (*claim.ours, *claim.others)}
        if all(article.condition(x).batch_norm == "none" for x in numbers):
            return None
        return _difference(claim, self.recalibrated)

    def told(self) -> set[tuple[int, int]]:
        """(condition, seed) of each run that a difference is of."""
        return {
            (number, seed)
            for claim in self.control.claims
            for _, number in (*claim.ours, *claim.others)
            for seed in _seeds(claim, self.accuracies)
        }

    def verdicts(self) -> list[str]:
        """What is said of each claim."""
        return [
            verdict(
                claim,
                self.difference(claim),
                self.recalibrated_difference(claim),
            )
            for claim in self.control.claims
        ]


def _seeds(claim, accuracies):
    """The seeds of which there is all of a claim, in order."""
    terms = (*claim.ours, *claim.others)
    of_terms = [set(accuracies.get(term, ())) for term in terms]
    return sorted(set.intersection(*of_terms))


def _difference(claim, accuracies):
    seeds = _seeds(claim, accuracies)
    if not seeds:
        return None
    sums = [
        [sum(accuracies[t][seed] for t in side) for seed in seeds]
        for side in (claim.ours, claim.others)
    ]
    return comparison.paired_difference(*sums)


def begun(output: Path | str) -> bool:
    """Whether there are runs of control experiments, finished or not."""
    root = Path(output) / FOLDER
    return result_files.has_files(root, "*/*/*/*/run.json") or (
        result_files.has_files(root / ARTICLE, "*/*/run.json")
    )


def read(output: Path | str) -> list[Results]:
    """Reads the control experiments below a folder of results.

    Only finished runs enter, and controls that have one of their own: the
    article's settings alone answer no question.

    Raises:
        ExperimentError: a file is damaged, or runs differ in more than their
            arms do, or are not what their arm says.
    """
    found = []
    for control in CONTROLS.values():
        runs = {}
        for arm in control.arms:
            path = folder(output, control, arm)
            # A process that has just begun has made no more than folders.
            if result_files.has_files(path, "*/*/run.json"):
                runs[arm.name] = [
                    run
                    for run in result_files.read_runs(path)
                    if run.finished
                    and run.condition.number in control.conditions
                ]
        if any(runs.get(arm.name) for arm in control.own_arms):
            for arm in control.arms:
                path = folder(output, control, arm)
                _require_arm(control, arm, path, runs.get(arm.name, ()))
            facts = [run.facts for own in runs.values() for run in own]
            names = {*same_settings.SETTINGS, "steps"} - control.changed
            same_settings.require_same_settings(facts, sorted(names))
            found.append(
                Results(
                    control,
                    runs,
                    _by_seed(runs, _accuracy),
                    _by_seed(runs, _recalibrated),
                )
            )
    return found


def all_runs(found: Sequence[Results]) -> list[result_files.Run]:
    """Every run of some controls, those that they share once."""
    runs = {}
    for results in found:
        for arm in results.control.arms:
            own = results.control.name, arm.name
            where = own if arm.changes else ARTICLE
            for run in results.runs.get(arm.name, ()):
                runs[where, run.condition.number, run.seed] = run
    return list(runs.values())


def _require_arm(control, arm, path, runs):
    usual = {x.name: x.default for x in dataclasses.fields(Settings)}
    for name in sorted(control.changed):
        right = arm.changes.get(name, usual[name])
        for run in runs:
            if run.facts.get(name) != right:
                raise ExperimentError(
                    f"{path} has a run whose {name} is "
                    f"{same_settings.describe(run.facts.get(name))}; in this "
                    f"arm it is {same_settings.describe(right)}: move or "
                    "delete that folder"
                )


def _by_seed(runs, value):
    """(name of an arm, condition) -> {seed: value of its run}."""
    found = {}
    for arm, own in runs.items():
        for run in own:
            if (of_run := value(run)) is not None:
                key = arm, run.condition.number
                found.setdefault(key, {})[run.seed] = of_run
    return found


def _accuracy(run):
    return float(np.mean(run.accuracies[-LAST_EVALUATIONS:]))


def _recalibrated(run):
    if run.condition.batch_norm == "none":
        return float(run.accuracies[-1])
    return run.recalibrated


def verdict(
    claim: Claim,
    difference: Difference | None,
    recalibrated: Difference | None = None,
) -> str:
    """What the results make of a claim, in a sentence.

    With recalibrated statistics there is one more, whose interval the reader
    may judge.
    """
    if difference is None:
        return f"{claim.words}: not measured yet."
    said = f"{claim.words}: {_points(difference)}"
    if difference.low is None:
        return f"{said}, of one seed: no interval, hence no verdict."
    if not difference.excludes_zero:
        said += ": no difference is shown."
    else:
        said += ": the interval excludes 0."
    if recalibrated is not None:
        said += (
            " At the last step, with recalibrated statistics: "
            f"{_points(recalibrated)}"
        )
        said += "." if recalibrated.low is not None else ", of one seed."
    return said


def _points(difference):
    said = f"{100 * difference.mean:+.1f} points of test accuracy"
    if difference.low is not None:
        said += (
            f", 95% interval {100 * difference.low:+.1f} to "
            f"{100 * difference.high:+.1f} over {difference.count} seeds"
        )
    return said

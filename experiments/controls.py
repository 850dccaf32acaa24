"""The control experiments: what else the article's gap may be due to.

Each is a small grid of runs, `<results>/controls/<name>/<arm>/<condition>/
<seed>/`, whose arms differ in one or two settings, and a few claims. The arm
of the article's own settings is the same in all of them, so its runs are in
`<results>/controls/article/`, trained once. A claim is a sum of
accuracies less another, of the same seeds; what it comes to, and its
confidence interval over the seeds, makes the sentence of the report.
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
from experiments.run_settings import Settings

STEPS = 8 * article.BATCHES_PER_EPOCH
EVAL_EVERY = 2 * article.BATCHES_PER_EPOCH // 5
# The evaluations at the end of a run whose mean is its accuracy: one alone is
# off by what the moving average happens to be.
LAST_EVALUATIONS = 5
FOLDER = "controls"
# Of the runs with the article's settings, which no control changes.
ARTICLE = "article"
# Without batch normalization these change nothing.
_OF_BATCH_NORM = {"layer", "placement"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One choice of settings.

    Attributes:
        name: of its folder.
        words: of its figure.
        changes: attributes of `Settings` that are not the article's.
    """

    name: str
    words: str
    changes: Mapping[str, object]

    def differs_in(self, number: int) -> bool:
        """Whether a condition's network, or its training, is another here."""
        if article.condition(number).batch_norm != "none":
            return True
        return not self.changes or not self.changes.keys() <= _OF_BATCH_NORM


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is asked of the results.

    Attributes:
        words: what the difference is, as the subject of a sentence.
        ours, others: (name of an arm, condition) of the accuracies that are
            added, and of those that are taken away.
    """

    words: str
    ours: tuple[tuple[str, int], ...]
    others: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Control:
    """A control experiment.

    Attributes:
        name: of the preset and of its folder.
        question: one sentence.
        conditions: the article's numbers.
        arms: what differs.
        claims: what is asked.
    """

    name: str
    question: str
    conditions: tuple[int, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]

    @property
    def changed(self) -> set[str]:
        """The attributes of `Settings` in which the arms differ."""
        return {name for arm in self.arms for name in arm.changes}

    @property
    def own_arms(self) -> list[Arm]:
        """The arms but for that of the article's settings."""
        return [arm for arm in self.arms if arm.changes]


def _gap(arm, words):
    return Claim(
        f"Batch normalization (condition 9 less condition 0) on {words}",
        ((arm, 9),),
        ((arm, 0),),
    )


def _taken(arm, words):
    return Claim(
        words,
        (("raw_fixed", 9), (arm, 0)),
        (("raw_fixed", 0), (arm, 9)),
    )


def _rate_claim(name, rate, number):
    return Claim(
        f"A learning rate of {rate} instead of 0.001, in condition {number}",
        ((name, number),),
        (("rate_0.001", number),),
    )


CONTROLS = {
    control.name: control
    for control in (
        Control(
            "input_and_order",
            "How much of the gap between the conditions is batch "
            "normalization, and how much is that the article's pixels are not "
            "scaled and its batches never reshuffled?",
            (0, 9, 11),
            (
                Arm("raw_fixed", "raw pixels, fixed order (article)", {}),
                Arm("raw_reshuffled", "raw, reshuffled", {"shuffle": True}),
                Arm(
                    "standardized_fixed",
                    "standardized, fixed order",
                    {"input": "standardized"},
                ),
                Arm(
                    "standardized_reshuffled",
                    "standardized, reshuffled",
                    {"input": "standardized", "shuffle": True},
                ),
            ),
            (
                _gap("raw_fixed", "raw pixels in fixed order"),
                _gap(
                    "standardized_reshuffled",
                    "standardized pixels, reshuffled",
                ),
                _taken(
                    "standardized_reshuffled",
                    "What standardizing and reshuffling take away of the gap "
                    "on raw pixels in fixed order",
                ),
                _gap(
                    "standardized_fixed", "standardized pixels in fixed order"
                ),
                _taken(
                    "standardized_fixed",
                    "What standardizing alone takes away of the gap on raw "
                    "pixels in fixed order",
                ),
                Claim(
                    "Standardizing pixels without batch normalization "
                    "(condition 0, fixed order)",
                    (("standardized_fixed", 0),),
                    (("raw_fixed", 0),),
                ),
                Claim(
                    "Reshuffling without batch normalization (condition 0, "
                    "raw pixels)",
                    (("raw_reshuffled", 0),),
                    (("raw_fixed", 0),),
                ),
                Claim(
                    "Dropout 0.4 beside batch normalization (condition 11 "
                    "less condition 9, as published)",
                    (("raw_fixed", 11),),
                    (("raw_fixed", 9),),
                ),
            ),
        ),
        Control(
            "placement",
            "Where should batch normalization stand?",
            (0, 9),
            (
                Arm("after", "after the activation (article)", {}),
                Arm(
                    "before",
                    "before the activation",
                    {"placement": "before"},
                ),
                Arm("input", "on the images alone", {"placement": "input"}),
            ),
            (
                Claim(
                    "Batch normalization before the activation instead of "
                    "after it (condition 9)",
                    (("before", 9),),
                    (("after", 9),),
                ),
                Claim(
                    "Batch normalization of the images alone (against none, "
                    "condition 0)",
                    (("input", 9),),
                    (("after", 0),),
                ),
                Claim(
                    "Batch normalization of all layers against that of the "
                    "images alone",
                    (("after", 9),),
                    (("input", 9),),
                ),
            ),
        ),
        Control(
            "learning_rate",
            "Is the gap one of learning rates?",
            (0, 9),
            tuple(
                Arm(
                    f"rate_{rate:g}",
                    f"learning rate {rate:g}",
                    {}
                    if rate == article.LEARNING_RATE
                    else {"learning_rate": rate},
                )
                for rate in (1e-4, 1e-3, 1e-2)
            ),
            (
                _gap("rate_0.0001", "a learning rate of 0.0001"),
                _gap("rate_0.001", "the article's learning rate, 0.001"),
                _gap("rate_0.01", "a learning rate of 0.01"),
                _rate_claim("rate_0.0001", "0.0001", 0),
                _rate_claim("rate_0.01", "0.01", 9),
            ),
        ),
        Control(
            "layer",
            "Is it our layer?",
            (9, 11),
            (
                Arm("keras_bn", "keras_bn.BatchNormalization", {}),
                Arm(
                    "keras",
                    "keras.layers.BatchNormalization",
                    {"layer": "keras"},
                ),
            ),
            tuple(
                Claim(
                    f"Our layer instead of Keras's (condition {number})",
                    (("keras_bn", number),),
                    (("keras", number),),
                )
                for number in (9, 11)
            ),
        ),
    )
}


# The attributes of `Settings` in which any control's arms differ.
CHANGED = {name for control in CONTROLS.values() for name in control.changed}


def folder(output: Path | str, control: Control, arm: Arm) -> Path:
    """Returns the folder of an arm's runs."""
    root = Path(output) / FOLDER
    return root / control.name / arm.name if arm.changes else root / ARTICLE


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


def _difference(claim, accuracies):
    terms = [*claim.ours, *claim.others]
    if not all(term in accuracies for term in terms):
        return None
    seeds = sorted(set.intersection(*(set(accuracies[t]) for t in terms)))
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
        said += f": {'more' if difference.mean > 0 else 'less'}, clearly."
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

"""The control experiments: what else the article's gap may be due to.

Each is a small grid of runs, `<results>/controls/<name>/<arm>/<condition>/
<seed>/`, whose arms differ in one or two settings, and a few claims. The arm
of the article's own settings is the same in all of them, so its runs are in
`<results>/controls/article/`, trained once. A claim is a sum of accuracies
less another, of the same seeds; `control_results` says what it comes to.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from experiments import article

STEPS = 8 * article.BATCHES_PER_EPOCH
EVAL_EVERY = 2 * article.BATCHES_PER_EPOCH // 5
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
        in_short: whether the report begins with what it comes to.
    """

    words: str
    ours: tuple[tuple[str, int], ...]
    others: tuple[tuple[str, int], ...]
    in_short: bool = False


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


def _gap(arm, where, in_short=False):
    return Claim(
        f"Batch normalization (condition 9 less condition 0) {where}",
        ((arm, 9),),
        ((arm, 0),),
        in_short,
    )


def _taken(arm, what_takes, in_short=False):
    return Claim(
        f"What {what_takes} away of the gap on raw pixels in fixed order",
        (("raw_fixed", 9), (arm, 0)),
        (("raw_fixed", 0), (arm, 9)),
        in_short,
    )


def _dropout(arm, where):
    return Claim(
        "Dropout 0.4 beside batch normalization (condition 11 less condition "
        f"9) {where}",
        ((arm, 11),),
        ((arm, 9),),
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
                _gap("raw_fixed", "on raw pixels in fixed order", True),
                _gap("raw_reshuffled", "on raw pixels, reshuffled"),
                _gap(
                    "standardized_fixed",
                    "on standardized pixels in fixed order",
                    True,
                ),
                _gap(
                    "standardized_reshuffled",
                    "on standardized pixels, reshuffled",
                ),
                _taken("raw_reshuffled", "reshuffling alone takes"),
                _taken("standardized_fixed", "standardizing alone takes", True),
                _taken(
                    "standardized_reshuffled",
                    "standardizing and reshuffling take",
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
                _dropout("raw_fixed", "on raw pixels in fixed order"),
                _dropout("raw_reshuffled", "on raw pixels, reshuffled"),
                _dropout(
                    "standardized_fixed",
                    "on standardized pixels in fixed order",
                ),
                _dropout(
                    "standardized_reshuffled",
                    "on standardized pixels, reshuffled",
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
                    True,
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
                _gap("rate_0.0001", "at a learning rate of 0.0001"),
                _gap("rate_0.001", "at the article's learning rate, 0.001"),
                _gap("rate_0.01", "at a learning rate of 0.01"),
                Claim(
                    "Batch normalization at a learning rate of 0.001 against "
                    "none at 0.0001",
                    (("rate_0.001", 9),),
                    (("rate_0.0001", 0),),
                    True,
                ),
                _rate_claim("rate_0.0001", "0.0001", 0),
                _rate_claim("rate_0.01", "0.01", 9),
            ),
        ),
        Control(
            "layer",
            "Is it our layer?",
            (9, 11),
            (
                Arm("keras_bn", "our layer", {}),
                Arm(
                    "keras",
                    "Keras's layer",
                    {"layer": "keras"},
                ),
            ),
            tuple(
                Claim(
                    f"Our layer instead of Keras's (condition {number})",
                    (("keras_bn", number),),
                    (("keras", number),),
                    True,
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

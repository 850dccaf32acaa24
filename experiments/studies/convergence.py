"""Does batch normalization reach a given loss in fewer steps and less time?"""

import dataclasses

import numpy as np

from experiments import report_plots
from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.study import curves
from experiments.studies.verdict import Question

# Training losses; ln(10) = 2.30 is that of a network that knows nothing.
_LOSSES = (1.7, 1.5, 1.3)
# An eighth fewer steps, or less time, as a power of 2.
_LEAST = 0.2
_UNIT = "doublings"


def _question(what, words, loss):
    return Question(
        f"{words} without batch normalization over that with it, to a "
        f"training loss of {loss}",
        (f"{what} to {loss}, none",),
        (f"{what} to {loss}, batch",),
        _LEAST,
        ("none",),
        f"for {what} to a loss of {loss}",
        _UNIT,
        1.0,
    )


class Convergence(Study):
    name = "convergence"
    title = "Faster convergence"
    claim = (
        "Batch normalization reaches a given loss in fewer steps and less time."
    )
    source = "article 000, 4.1"
    arms = (
        Arm("none", "without", {"architecture": Architecture()}),
        Arm(
            "batch",
            "batch normalization",
            {"architecture": Architecture("batch")},
        ),
    )
    questions = tuple(
        _question(what, words, loss)
        for what, words in (
            ("steps", "Training steps"),
            ("seconds", "Training time"),
        )
        for loss in _LOSSES
    )
    axis = "whether steps or seconds count, and on the loss"
    would_change = (
        "A network whose other layers take longer: there a step's batch "
        "normalization costs a smaller share."
    )
    # Evaluated often enough to tell the step at which a loss is reached.
    real = dataclasses.replace(REAL, seeds=10, eval_every=20)

    def quantities(self, runs):
        found = {}
        for arm, own in runs.items():
            for seed, record in own.items():
                seconds = _seconds_a_step(record)
                for loss in _LOSSES:
                    steps = _steps_to(record, loss)
                    for what, value in (
                        ("steps", steps),
                        ("seconds", steps * seconds),
                    ):
                        of_seeds = found.setdefault(
                            f"{what} to {loss}, {arm}", {}
                        )
                        of_seeds[seed] = float(np.log2(value))
        return found

    def figure(self, results):
        lines = [
            (self.words(arm), *curves(results.runs[arm], "train_loss"))
            for arm in results.arms
        ]
        return report_plots.draw_lines(
            f"study_{self.name}", lines, "training steps", "training loss"
        )

    def caption(self, results):
        return (
            "Training loss, the mean since the evaluation before; bands are "
            "a standard deviation over the seeds. A loss that is never "
            "reached counts as reached at the end."
        )


def _steps_to(record, loss):
    """The first evaluation since which the training loss was that low."""
    below = np.flatnonzero(record.lines["train_loss"] <= loss)
    steps = record.lines["step"]
    return float(steps[below[0]] if len(below) else steps[-1])


def _seconds_a_step(record):
    # The median: the first steps include compilation.
    speed = float(np.median(record.lines["images_per_second"]))
    return record.facts["batch_size"] / speed


STUDY = Convergence()

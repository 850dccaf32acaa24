"""Does batch normalization make the weights' initial scale matter less?"""

import dataclasses

import numpy as np

from experiments import report_plots
from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

SCALES = (0.01, 0.1, 1.0, 3.0, 10.0)
_KINDS = {"none": "without", "batch": "batch normalization"}
# Nine convolutions, a dense layer and the logits.
_DEPTH = 3
_LEAST = 5.0


def _name(kind, scale):
    return f"{kind}_{scale:g}"


def _question(scale):
    return Question(
        f"What an initial scale of {scale:g} instead of 1 costs without batch "
        "normalization, less what it costs with it",
        (_name("none", 1.0), _name("batch", scale)),
        (_name("none", scale), _name("batch", 1.0)),
        _LEAST,
        (_name("none", 1.0),),
        f"at {scale:g} times Glorot's scale",
    )


class Initialization(Study):
    name = "initialization"
    title = "Initial weights"
    claim = (
        "Batch normalization makes the initial scale of the weights matter "
        "less."
    )
    source = "article 000, 3 and 4.2"
    arms = tuple(
        Arm(
            _name(kind, scale),
            f"{words}, {scale:g} times Glorot",
            {
                "architecture": Architecture(
                    kind, depth=_DEPTH, initial_scale=scale
                )
            },
        )
        for scale in SCALES
        for kind, words in _KINDS.items()
    )
    questions = tuple(_question(scale) for scale in SCALES if scale != 1.0)
    axis = "the scale"
    would_change = (
        "A network with residual connections or with kernels of He's scale, "
        "in which depth alone does not shrink the signal."
    )
    # The loss of nine convolutions takes that long to flatten.
    real = dataclasses.replace(REAL, seeds=3, steps=1_440, eval_every=90)
    quick = dataclasses.replace(QUICK, arms=("none_1", "none_10"))

    def figure(self, results):
        quantities, lines = results.quantities, []
        for kind, words in _KINDS.items():
            own = {
                scale: quantities[_name(kind, scale)]
                for scale in SCALES
                if _name(kind, scale) in quantities
            }
            if own:
                seeds = sorted(set.intersection(*map(set, own.values())))
                values = [[of[seed] for of in own.values()] for seed in seeds]
                lines.append((words, np.array(list(own)), np.array(values)))
        return report_plots.draw_lines(
            f"study_{self.name}",
            lines,
            "initial scale of all kernels, times Glorot's",
            self.unit,
            log="x",
        )

    def caption(self, results):
        return (
            "Test accuracy, the mean of the last quarter of the evaluations, "
            "of a network of nine convolutions and a dense layer; bands are a "
            "standard deviation over the seeds."
        )


STUDY = Initialization()

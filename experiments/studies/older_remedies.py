"""Were penalties on statistics, and normalizing between steps, worse?"""

import dataclasses

from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

_PENALTIES = (0.001, 0.01, 0.1)
_LEAST = 1.5


def _question(words, arm, when):
    return Question(
        f"Batch normalization instead of {words}",
        ("batch",),
        (arm,),
        _LEAST,
        ("none", "batch"),
        when,
    )


class OlderRemedies(Study):
    name = "older_remedies"
    title = "Older remedies"
    claim = (
        "Penalties on statistics, and normalizing between steps, are worse "
        "than batch normalization."
    )
    source = "article 001"
    arms = (
        Arm("none", "without", {"architecture": Architecture()}),
        Arm(
            "batch",
            "batch normalization",
            {"architecture": Architecture("batch")},
        ),
        *(
            Arm(
                f"penalty_{weight:g}",
                f"penalty of weight {weight:g}",
                {"architecture": Architecture(penalty=weight)},
            )
            for weight in _PENALTIES
        ),
        Arm(
            "between",
            "normalized between steps",
            {"architecture": Architecture("previous_batch")},
        ),
    )
    questions = (
        *(
            _question(
                f"a penalty of weight {weight:g} on means and variances",
                f"penalty_{weight:g}",
                f"beside a penalty of {weight:g}",
            )
            for weight in _PENALTIES
        ),
        _question(
            "normalizing between steps, by the moments of the batch before",
            "between",
            "beside normalizing between steps",
        ),
    )
    axis = "the remedy"
    would_change = (
        "A penalty whose weight falls while training, or moments over more "
        "than one batch between steps."
    )
    real = dataclasses.replace(REAL, seeds=10)
    quick = dataclasses.replace(QUICK, arms=("batch", "penalty_0.1", "between"))

    def caption(self, results):
        return (
            f"{super().caption(results)} A penalty is the mean over channels "
            "of the squared mean and of the squared distance of the variance "
            "from 1, of each layer before its activation. Between steps, each "
            "layer is normalized by the moments of the batch before, which "
            "the gradient does not see."
        )


STUDY = OlderRemedies()

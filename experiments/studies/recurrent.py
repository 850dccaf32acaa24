"""Does batch normalization suit recurrent networks badly?"""

import dataclasses

from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

_UNITS = 64
_LEAST = 1.5


class Recurrent(Study):
    name = "recurrent"
    title = "Recurrent networks"
    claim = (
        "Batch normalization suits recurrent networks badly, layer "
        "normalization well."
    )
    source = "article 000, 5 (problem 2)"
    arms = tuple(
        Arm(name, words, {"architecture": Architecture(name)})
        for name, words in (
            ("none", "LSTM"),
            ("batch_inputs", "batch normalization on the inputs alone"),
            ("batch_recurrent", "recurrent batch normalization"),
            ("layer", "layer normalization"),
        )
    )
    questions = (
        Question(
            "Layer normalization instead of none",
            ("layer",),
            ("none",),
            _LEAST,
            ("none", "layer"),
            "for layer normalization helping",
        ),
        Question(
            "Layer normalization instead of recurrent batch normalization",
            ("layer",),
            ("batch_recurrent",),
            _LEAST,
            ("layer", "batch_recurrent"),
            "for layer normalization being better than the batch's",
        ),
        Question(
            "No normalization instead of recurrent batch normalization",
            ("none",),
            ("batch_recurrent",),
            _LEAST,
            ("none", "batch_recurrent"),
            "for recurrent batch normalization doing harm",
        ),
        Question(
            "No normalization instead of batch normalization on the inputs",
            ("none",),
            ("batch_inputs",),
            _LEAST,
            ("none", "batch_inputs"),
            "for batch normalization of the inputs doing harm",
        ),
    )
    axis = "what is asked"
    against = (
        "Cooijmans et al. (2016) report that recurrent batch normalization "
        "trains faster and generalizes better than none."
    )
    would_change = (
        "Sequences of different lengths, or longer in use than in training: "
        "statistics of single time steps are then missing."
    )
    # The loss of an LSTM takes that long to flatten.
    real = dataclasses.replace(REAL, seeds=6, steps=1_920, eval_every=120)
    quick = dataclasses.replace(QUICK, arms=("none", "layer"))

    def network(self, settings):
        """An LSTM that reads an image two rows at a time."""
        from experiments.studies import recurrent_layers

        return recurrent_layers.build(
            settings.architecture.normalization,
            settings.architecture.layer,
            _UNITS,
            settings.seed,
        )

    def caption(self, results):
        return (
            f"{super().caption(results)} An LSTM of {_UNITS} units reads the "
            "images two rows at a time, in 8 steps. Recurrent batch "
            "normalization has statistics of each time step (Cooijmans et "
            "al., 2016, arXiv 1603.09025), gamma beginning at 0.1; layer "
            "normalization is that of Ba et al. (2016, arXiv 1607.06450)."
        )


STUDY = Recurrent()

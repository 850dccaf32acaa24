"""Where should batch normalization stand, and is a bias before it needless?"""

import dataclasses

from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

_DEPTHS = {1: "three convolutions", 3: "nine convolutions"}
_LEAST = 1.5


def _arms(depth, words):
    choices = {
        "before": ("before the activation", {}),
        "after": ("after the activation", {"placement": "after"}),
        "input": ("on each layer's input", {"placement": "input"}),
        "no_bias": ("before the activation, no bias", {"bias": False}),
    }
    return tuple(
        Arm(
            f"{name}_{depth}",
            f"{words}, {where}",
            {"architecture": Architecture("batch", depth=depth, **changes)},
        )
        for name, (where, changes) in choices.items()
    )


def _questions(depth, words):
    reference = (f"after_{depth}", f"before_{depth}")
    return (
        Question(
            f"Before the activation instead of after it, {words}",
            (f"before_{depth}",),
            (f"after_{depth}",),
            _LEAST,
            reference,
            f"against after the activation, {words}",
        ),
        Question(
            f"Before the activation instead of on each layer's input, {words}",
            (f"before_{depth}",),
            (f"input_{depth}",),
            _LEAST,
            reference[1:],
            f"against the layer's input, {words}",
        ),
        Question(
            f"Without a bias before it, {words}",
            (f"no_bias_{depth}",),
            (f"before_{depth}",),
            _LEAST,
            reference[1:],
            f"for the bias, {words}",
            same=True,
        ),
    )


class Placement(Study):
    name = "placement"
    title = "Placement"
    claim = (
        "Batch normalization belongs between a layer and its activation, and "
        "makes the layer's bias needless."
    )
    source = "article 001, after Ioffe and Szegedy, 2015"
    arms = tuple(
        arm for depth, words in _DEPTHS.items() for arm in _arms(depth, words)
    )
    questions = tuple(
        question
        for depth, words in _DEPTHS.items()
        for question in _questions(depth, words)
    )
    axis = "what it is compared with, and on the depth"
    would_change = (
        "An activation that saturates, such as the sigmoid: before it the "
        "normalization decides how much of it is used."
    )
    # The loss of nine convolutions takes that long to flatten.
    real = dataclasses.replace(REAL, seeds=5, steps=1_440, eval_every=90)
    quick = dataclasses.replace(QUICK, arms=("before_1", "after_1", "input_1"))


STUDY = Placement()

"""What measured effects make of a claim."""

import numpy as np
import pytest
from scipy import stats

from experiments.studies import verdict
from experiments.studies.verdict import Question

_NOISE = np.array([0.0, 0.004, -0.003, 0.001])
_FLAT = [np.linspace(2.0, 1.0, 10).tolist() + [1.0] * 30] * 4
_FALLING = [np.linspace(2.0, 1.0, 40)] * 4


def _question(**changes):
    values = {
        "words": "Ours less theirs",
        "ours": ("ours",),
        "others": ("theirs",),
        "minimum": 2.0,
        "reference": ("theirs",),
        "when": "here",
    }
    return Question(**{**values, **changes})


def _answer(effect, losses=_FLAT, unfit="", seeds=4, **changes):
    """The answer where ours is so many points above theirs."""
    theirs = 0.5 + _NOISE[:seeds]
    ours = theirs + effect / 100 + _NOISE[:seeds][::-1]
    quantities = {
        "ours": dict(enumerate(ours)),
        "theirs": dict(enumerate(theirs)),
    }
    losses = {"theirs": np.array(losses)}
    return verdict.answer(_question(**changes), quantities, losses, unfit)


def test_the_interval_is_students_over_paired_seeds():
    answer = _answer(5.0)
    differences = 5.0 + 100 * _NOISE[::-1]
    right = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert answer.difference.mean == pytest.approx(differences.mean())
    assert answer.difference.low == pytest.approx(right.low)
    assert answer.difference.high == pytest.approx(right.high)
    assert "95% interval +4.5" in answer.effect
    assert "over 4 seeds" in answer.effect


@pytest.mark.parametrize(
    ("effect", "outcome"),
    [
        (5.0, verdict.SUPPORTED),
        # A wrong sign turns the verdict.
        (-5.0, verdict.NOT_SUPPORTED),
        # There is an effect, but not the one that was declared.
        (1.0, verdict.NOT_SUPPORTED),
        (0.0, verdict.NOT_SUPPORTED),
        # The interval includes the minimum, and the mean is below it.
        (1.9, verdict.NOT_ASSESSED),
    ],
)
def test_outcomes(effect, outcome):
    assert _answer(effect).outcome == outcome


def test_an_interval_that_includes_zero_supports_nothing():
    quantities = {
        "ours": dict(enumerate((0.6, 0.4, 0.7, 0.6))),
        "theirs": dict(enumerate((0.5, 0.5, 0.5, 0.5))),
    }
    answer = verdict.answer(
        _question(), quantities, {"theirs": np.array(_FLAT)}
    )
    assert answer.difference.mean == pytest.approx(7.5)
    assert answer.outcome == verdict.NOT_ASSESSED


@pytest.mark.parametrize(
    ("effect", "outcome"),
    [
        (0.2, verdict.SUPPORTED),
        (5.0, verdict.NOT_SUPPORTED),
        (-5.0, verdict.NOT_SUPPORTED),
        (2.0, verdict.NOT_ASSESSED),
    ],
)
def test_a_claim_of_no_difference(effect, outcome):
    answer = _answer(effect - 0.05, same=True)
    if effect == 2.0:
        answer = _answer(1.8, same=True)
    assert answer.outcome == outcome


def test_a_claim_of_no_loss():
    """A minimum below zero: what may be lost at most."""
    assert _answer(0.0, minimum=-2.0).outcome == verdict.SUPPORTED
    assert _answer(-5.0, minimum=-2.0).outcome == verdict.NOT_SUPPORTED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"losses": _FALLING}, "the loss of theirs still falls"),
        ({"unfit": "measured on digits"}, "measured on digits"),
        ({"seeds": 1}, "one seed has no interval"),
        ({"ours": ("nobody",)}, "no measurement of all of it"),
    ],
)
def test_what_is_not_assessed(changes, reason):
    answer = _answer(5.0, **changes)
    assert answer.outcome == verdict.NOT_ASSESSED
    assert answer.reason == reason
    assert answer.sentence.endswith(f"not assessed ({reason}).")


def test_flattened():
    assert verdict.flattened(np.array(_FLAT))
    assert not verdict.flattened(np.array(_FALLING))
    # It rises again: more steps make nothing better.
    assert verdict.flattened([[2.0, 1.5, 1.0, 0.9, 0.9, 0.95, 1.0, 1.2]])
    # It never learned.
    assert verdict.flattened([[2.31, 2.3, 2.3, 2.302, 2.3, 2.3, 2.3, 2.3]])
    assert verdict.flattened([[2.0, np.nan, np.nan, np.nan]])
    # The whole third quarter counts, its mean, and no other evaluation.
    for third, flat in (
        ((1.09, 1.0), True),
        ((1.0, 1.09), True),
        ((1.12, 1.0), False),
        ((1.0, 1.12), False),
    ):
        for before in (1.0, 2.0):
            loss = [2.0, 2.0, before, before, *third, 1.0, 1.0]
            assert verdict.flattened([loss]) is flat
    # Too few evaluations to tell.
    assert not verdict.flattened([[2.0, 1.0, 1.0]])


def test_the_verdict_on_a_claim():
    good, bad = _answer(5.0, when="here"), _answer(-5.0, when="there")
    unknown = _answer(5.0, unfit="measured on digits")
    assert verdict.overall([good, good], "it") == "supported"
    assert (
        verdict.overall([bad, unknown], "it")
        == "not supported (1 of 2 questions assessed)"
    )
    assert verdict.overall([unknown], "it") == "not assessed"
    assert (
        verdict.overall([good, bad], "the place")
        == "depends on the place: holds here, but not there"
    )

"""What measured effects make of a claim.

A question asks for a difference. Its answer has a verdict only where the
reference's loss has flattened (more training would not change what it is
compared with), there are seeds enough for a 95% interval (Student's t over
paired seeds), and the data are CIFAR-10 in the study's real setting:

    supported      the interval lies above zero and the mean is at least the
                   minimum effect that the study declares
    not supported  the whole interval lies below that minimum: there is no
                   such effect, or the opposite one
    not assessed   anything else

A question whose claim is that there is no difference (`same`) is supported
where the whole interval is within the minimum to either side, and not
supported where it excludes zero and the mean is at least the minimum.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from experiments import comparison
from experiments.comparison import Difference

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
NOT_ASSESSED = "not assessed"
DEPENDS = "depends on"
# A loss that falls, from the third quarter of the evaluations to the last, by
# no more than this share of all that it has fallen, has flattened.
FLAT_SHARE = 0.05
# Loss of a network that knows nothing falls by less than this.
_FLAT_LEAST = 0.01


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of a study's results.

    Attributes:
        words: what the difference is, as the subject of a sentence; it is
            positive where the claim holds.
        ours, others: names of the quantities that are added, and of those
            that are taken away, seed by seed.
        minimum: the least effect that counts, declared before measuring;
            below zero it is what may be lost where the claim holds.
        reference: arms whose loss must have flattened; empty where nothing
            is trained.
        when: what tells this question from the others of its study, such as
            "with SGD".
        unit: what the difference is counted in.
        factor: from the quantities' unit to that one.
        same: whether the claim is that there is no difference.
    """

    words: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    minimum: float
    reference: tuple[str, ...]
    when: str
    unit: str = "points of test accuracy"
    factor: float = 100.0
    same: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a question's answer is.

    Attributes:
        question: the `Question`.
        difference: in the question's unit; None if it was not measured.
        outcome: `SUPPORTED`, `NOT_SUPPORTED` or `NOT_ASSESSED`.
        reason: why it is not assessed, else empty.
    """

    question: Question
    difference: Difference | None
    outcome: str
    reason: str = ""

    @property
    def effect(self) -> str:
        """The difference and its interval, in words."""
        difference = self.difference
        if difference is None:
            return "not measured yet"
        text = f"{difference.mean:+.3g} {self.question.unit}"
        if difference.low is None:
            return f"{text}, of one seed"
        return (
            f"{text}, 95% interval {difference.low:+.3g} to "
            f"{difference.high:+.3g} over {difference.count} seeds"
        )

    @property
    def sentence(self) -> str:
        outcome = self.outcome + (f" ({self.reason})" if self.reason else "")
        least = f"{self.question.minimum:g}"
        kind = "no more than" if self.question.same else "at least"
        return (
            f"{self.question.words}: {self.effect} (claimed: {kind} {least}): "
            f"{outcome}."
        )


def difference_of(
    question: Question, quantities: Mapping[str, Mapping[int, float]]
) -> Difference | None:
    """What a question comes to over the seeds that have all of it."""
    terms = [*question.ours, *question.others]
    if not all(term in quantities for term in terms):
        return None
    seeds = sorted(set.intersection(*(set(quantities[t]) for t in terms)))
    sums = [
        [
            question.factor * sum(quantities[term][seed] for term in side)
            for seed in seeds
        ]
        for side in (question.ours, question.others)
    ]
    if not seeds or not np.isfinite(sums).all():
        return None
    return comparison.paired_difference(*sums)


def flattened(losses: Sequence[np.ndarray]) -> bool:
    """Whether a loss has flattened.

    Args:
        losses: of each seed, the loss at each evaluation.
    """
    loss = np.mean(losses, axis=0)
    quarter = max(1, round(len(loss) / 4))
    if len(loss) < 4:
        return False
    last, before = loss[-quarter:].mean(), loss[-2 * quarter : -quarter].mean()
    if not np.isfinite(last):
        return True  # it has diverged, and will not come back
    return bool(
        before - last <= max(FLAT_SHARE * (loss[0] - last), _FLAT_LEAST)
    )


def answer(
    question: Question,
    quantities: Mapping[str, Mapping[int, float]],
    losses: Mapping[str, Sequence[np.ndarray]],
    unfit: str = "",
) -> Answer:
    """Answers a question.

    Args:
        question: what is asked.
        quantities: name -> seed -> value.
        losses: name of an arm -> of each seed, the loss at each evaluation.
        unfit: why no verdict may be made of these results; empty if one may.
    """
    difference = difference_of(question, quantities)
    reason = ""
    missing = [arm for arm in question.reference if arm not in losses]
    if difference is None or missing:
        reason = "no measurement of all of it"
    elif unfit:
        reason = unfit
    elif difference.low is None:
        reason = "one seed has no interval"
    else:
        rising = [
            arm for arm in question.reference if not flattened(losses[arm])
        ]
        if rising:
            reason = f"the loss of {', '.join(rising)} still falls"
    if reason:
        return Answer(question, difference, NOT_ASSESSED, reason)
    outcome = _outcome(question, difference)
    if outcome == NOT_ASSESSED:
        reason = "too few seeds or steps to tell"
    return Answer(question, difference, outcome, reason)


def _outcome(question, difference):
    least = question.minimum
    if question.same:
        if -least < difference.low and difference.high < least:
            return SUPPORTED
        if difference.excludes_zero and abs(difference.mean) >= least:
            return NOT_SUPPORTED
        return NOT_ASSESSED
    # A minimum below zero is what may be lost at most.
    if difference.low > min(0.0, least) and difference.mean >= least:
        return SUPPORTED
    if difference.high < least:
        return NOT_SUPPORTED
    return NOT_ASSESSED


def overall(answers: Sequence[Answer], axis: str) -> str:
    """The verdict on a claim, from the answers to its questions.

    Args:
        answers: to all of its questions.
        axis: what it may depend on.
    """
    assessed = [x for x in answers if x.outcome != NOT_ASSESSED]
    outcomes = {x.outcome for x in assessed}
    if not outcomes:
        return NOT_ASSESSED
    if len(outcomes) > 1:
        holds = [x.question.when for x in assessed if x.outcome == SUPPORTED]
        fails = [
            x.question.when for x in assessed if x.outcome == NOT_SUPPORTED
        ]
        said = (
            f"{DEPENDS} {axis}: holds {'; '.join(holds)}, but not "
            f"{'; '.join(fails)}"
        )
    else:
        said = outcomes.pop()
    if len(assessed) < len(answers):
        said += f" ({len(assessed)} of {len(answers)} questions assessed)"
    return said

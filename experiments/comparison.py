"""How results stand beside the article's, and beside one another: numbers.

Each function takes accuracies and returns figures; `report_sections` words
them.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from experiments import article
from experiments.report_summaries import Summary

# A difference is flagged from this many standard deviations on.
FLAG = 2.0
CONFIDENCE = 0.95
# An evaluation this far below the median of the 11 around it is a collapse.
COLLAPSE = 0.1
_AROUND = 11
_RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class AtStep:
    """A condition at one of the article's steps.

    Attributes:
        number: of the condition.
        step: one of `article.PUBLISHED_STEPS`.
        mean: over seeds, of each one's mean of the evaluations within the
            steps that the article's points span.
        deviation: standard deviation of those means over the seeds (n - 1);
            of one seed, that of its evaluations.
        low, high: the lowest and the highest of all those evaluations.
        seeds: how many there are.
        points: how many evaluations of a seed.
        complete: whether they reach to the end of that span.
        published, published_deviation: mean of the article's points there,
            11 or at the end 10 (of one run), and their standard deviation.
    """

    number: int
    step: int
    mean: float
    deviation: float
    low: float
    high: float
    seeds: int
    points: int
    complete: bool
    published: float
    published_deviation: float

    @property
    def difference(self) -> float:
        return self.mean - self.published

    @property
    def allowed(self) -> float:
        """How large a difference both spreads explain."""
        return FLAG * math.hypot(self.deviation, self.published_deviation)

    @property
    def flagged(self) -> bool:
        """Whether the difference is larger than that."""
        return abs(self.difference) > self.allowed


def at_published_steps(summary: Summary) -> list[AtStep]:
    """Compares a condition at the article's steps that its runs have passed.

    Args:
        summary: of the condition, on CIFAR-10.
    """
    published = article.PUBLISHED[summary.condition.number]
    found = []
    for step, (first, last) in article.PUBLISHED_SPANS.items():
        within = (summary.steps >= first) & (summary.steps <= last)
        if not within.any() or summary.steps[-1] < step:
            continue
        own = summary.accuracies[:, within]
        means = own.mean(axis=1)
        spread = means if len(means) > 1 else own[0]
        found.append(
            AtStep(
                number=summary.condition.number,
                step=step,
                mean=float(means.mean()),
                deviation=_deviation(spread),
                low=float(own.min()),
                high=float(own.max()),
                seeds=len(means),
                points=int(within.sum()),
                # Within the last interval between two evaluations.
                complete=_reaches(summary.steps, last),
                published=published.at_step[step],
                published_deviation=published.deviation_at_step[step],
            )
        )
    return found


@dataclasses.dataclass(frozen=True)
class RankOrder:
    """Kendall's tau-b between two orders of the conditions.

    Attributes:
        tau: -1 to 1; 1 is the same order.
        low, high: 95% bootstrap interval over seeds; None for one seed.
        conditions: how many were ranked.
    """

    tau: float
    low: float | None
    high: float | None
    conditions: int


def rank_order(
    accuracies: Sequence[np.ndarray], published: Sequence[float], seed: int = 0
) -> RankOrder:
    """Compares the order of conditions with the published one.

    Args:
        accuracies: of each condition, one value for each seed.
        published: of each condition.
        seed: of the bootstrap, which draws seeds within each condition.

    Returns:
        The `RankOrder` of the mean over seeds.
    """
    means = [float(np.mean(values)) for values in accuracies]
    tau = _tau(means, published)
    if min(map(len, accuracies)) < 2:
        return RankOrder(tau, None, None, len(means))
    generator = np.random.default_rng(seed)
    taus = [
        _tau(
            [generator.choice(v, len(v)).mean() for v in accuracies], published
        )
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(taus, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return RankOrder(tau, float(low), float(high), len(means))


def taus_of_seeds(
    accuracies: Sequence[Mapping[int, float]], published: Sequence[float]
) -> list[float]:
    """Kendall's tau of each seed's order of the conditions with the article's.

    Like by like: the article's is of one run of each, and a mean over seeds
    is calmer than either.

    Args:
        accuracies: of each condition, seed -> value. What not all conditions
            have is left out.
        published: of each condition.
    """
    seeds = sorted(set.intersection(*map(set, accuracies)))
    return [_tau([x[seed] for x in accuracies], published) for seed in seeds]


def published_tau(step: int) -> float:
    """Kendall's tau of the article's own order at a step and at its end.

    Args:
        step: one of `article.PUBLISHED_STEPS`.
    """
    last = article.PUBLISHED_STEPS[-1]
    every = article.PUBLISHED.values()
    return _tau(*([x.at_step[at] for x in every] for at in (step, last)))


def taus_between_seeds(
    accuracies: Sequence[Mapping[int, float]],
) -> list[float]:
    """Kendall's tau of the conditions' order between each two seeds.

    Args:
        accuracies: of each condition, seed -> value. What not all conditions
            have is left out.
    """
    seeds = sorted(set.intersection(*map(set, accuracies)))
    return [
        _tau([x[one] for x in accuracies], [x[other] for x in accuracies])
        for one, other in itertools.combinations(seeds, 2)
    ]


@dataclasses.dataclass(frozen=True)
class Stability:
    """How much a condition's test accuracy jumps about.

    Attributes:
        deviation: root mean square, over the second half of each run, of
            what an evaluation is off the mean of the `_AROUND` around it.
        collapses: of each seed, the evaluations that lie `COLLAPSE` or more
            below the median of those around.
        evaluations: how many of a seed were looked at.
    """

    deviation: float
    collapses: tuple[int, ...]
    evaluations: int


def stability(accuracies: np.ndarray) -> Stability | None:
    """The stability of a condition; None for fewer than 22 evaluations.

    Args:
        accuracies: shaped (seeds, evaluations).
    """
    half = _AROUND // 2
    if accuracies.shape[1] < 2 * _AROUND:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(
        accuracies, _AROUND, axis=1
    )
    # The first half is learning rather than jumping.
    start = windows.shape[1] // 2
    windows = windows[:, start:]
    centre = accuracies[:, half:-half][:, start:]
    off = centre - windows.mean(axis=-1)
    fallen = centre <= np.median(windows, axis=-1) - COLLAPSE
    return Stability(
        deviation=float(np.sqrt(np.mean(off**2))),
        collapses=tuple(map(int, fallen.sum(axis=1))),
        evaluations=centre.shape[1],
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of means, with its confidence interval.

    Attributes:
        mean: of the differences.
        low, high: 95% interval by Student's t; None for fewer than two.
        count: how many pairs of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


def paired_difference(
    ours: Sequence[float], others: Sequence[float]
) -> Difference:
    """The mean of ours less others, pair by pair: the same seeds in both."""
    differences = np.subtract(ours, others)
    count = len(differences)
    mean = float(differences.mean())
    if count < 2:
        return Difference(mean, None, None, count)
    # SciPy takes longer to import than all that a user's mistake needs.
    from scipy import stats

    reach = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    reach *= _deviation(differences) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach, count)


def _tau(ours, others) -> float:
    from scipy import stats

    return float(stats.kendalltau(ours, others).statistic)


def _deviation(values) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _reaches(steps, last) -> bool:
    interval = steps[-1] - steps[-2] if len(steps) > 1 else 0
    return bool(steps[-1] + interval > last)

"""Differences, rank orders and stability, against SciPy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments import article
from experiments import comparison
from experiments.report_summaries import Summary


def _summary(steps, accuracies, number=0):
    return Summary(
        article.CONDITIONS[number],
        runs=tuple(accuracies),
        unfinished=(),
        shorter=(),
        steps=np.array(steps),
        accuracies=np.array(accuracies, float),
    )


def test_the_articles_steps_are_compared_over_its_own_points():
    # Those at 400 and 2,600 are outside of the article's 540 to 2,590.
    found = comparison.at_published_steps(
        _summary([400, 1000, 2000, 2600], [[0, 0.4, 0.5, 1], [0, 0.5, 0.6, 1]])
    )
    assert [x.step for x in found] == [2000]
    (one,) = found
    assert one.mean == pytest.approx(0.5)
    assert one.deviation == pytest.approx(math.sqrt(0.005))
    assert (one.seeds, one.points, one.complete) == (2, 2, True)
    assert one.published == 0.469
    assert one.difference == pytest.approx(0.031)


def test_both_ends_of_a_span_belong_to_it():
    # The article's own points are from 540 to 2,590.
    (one,) = comparison.at_published_steps(
        _summary([539, 540, 2590, 2591], [[0, 0.4, 0.5, 1]])
    )
    assert (one.low, one.high, one.points) == (0.4, 0.5, 2)


def test_one_seed_has_the_spread_of_its_evaluations():
    (one,) = comparison.at_published_steps(
        _summary([1000, 2000], [[0.4, 0.5]])
    )
    assert one.deviation == pytest.approx(math.sqrt(0.005))


def test_steps_that_were_not_reached_are_left_out():
    assert not comparison.at_published_steps(_summary([600, 1500], [[0, 0]]))
    (one,) = comparison.at_published_steps(_summary([1000, 2050], [[0, 0]]))
    assert one.complete
    (one,) = comparison.at_published_steps(
        _summary([1900, 1950, 2000], [[0, 0, 0]])
    )
    assert not one.complete


def test_a_run_of_the_articles_length_is_compared_at_its_end():
    steps = range(156, article.STEPS + 1, 156)
    found = comparison.at_published_steps(_summary(steps, [[0.5] * 1_000]))
    assert tuple(x.step for x in found) == article.PUBLISHED_STEPS
    assert found[-1].step == article.STEPS
    assert found[-1].published == 0.568
    assert found[-1].complete
    assert found[-1].points == 7


@pytest.mark.parametrize(("off", "flagged"), [(0.11, False), (0.13, True)])
def test_a_difference_is_flagged_beyond_both_spreads(off, flagged):
    # Condition 0 at 2,000 has 0.469 with a deviation of 0.0548.
    ours = [[0.469 + off - 0.01, 0.469 + off - 0.01], [0.469 + off + 0.01] * 2]
    (one,) = comparison.at_published_steps(_summary([1000, 2000], ours))
    spread = math.hypot(math.sqrt(2) * 0.01, 0.0548)
    assert one.flagged is flagged is (off > 2 * spread)


def test_the_articles_facts_are_whole():
    for published in article.PUBLISHED.values():
        assert published.at_step.keys() == published.deviation_at_step.keys()
        assert all(0 < x < 0.2 for x in published.deviation_at_step.values())


def test_paired_difference_is_scipys():
    generator = np.random.default_rng(0)
    ours, others = generator.normal(0.02, 0.01, (2, 6))
    found = comparison.paired_difference(ours, others)
    right = stats.ttest_rel(ours, others).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((right.low, right.high))
    assert found.mean == pytest.approx(np.mean(ours - others))
    assert comparison.paired_difference([0.3], [0.1]).low is None


def test_an_interval_excludes_zero_only_if_the_signs_agree():
    assert comparison.paired_difference([3, 3.1, 2.9], [1, 1, 1]).excludes_zero
    assert not comparison.paired_difference([3, 1, 2], [2, 2, 2]).excludes_zero
    assert not comparison.paired_difference([3], [1]).excludes_zero


def _pairs_in_order(ours, others):
    """Kendall's tau of values without ties, by its definition."""
    signs = [
        np.sign((ours[i] - ours[j]) * (others[i] - others[j]))
        for i in range(len(ours))
        for j in range(i)
    ]
    return np.mean(signs)


def test_rank_order_counts_pairs():
    ours = [[0.1, 0.12], [0.3, 0.31], [0.2, 0.24], [0.4, 0.38]]
    published = [0.1, 0.2, 0.3, 0.35]
    found = comparison.rank_order(ours, published)
    means = [np.mean(x) for x in ours]
    assert found.tau == pytest.approx(_pairs_in_order(means, published))
    # These seeds never change places.
    assert found.low == found.high == pytest.approx(found.tau)
    wide = comparison.rank_order(
        [[0.1, 0.5], [0.2, 0.4], [0.3, 0.3]], published[:3]
    )
    assert wide.low < 0 < wide.high
    assert comparison.rank_order([[0.1], [0.2]], [1, 2]).low is None


def test_the_articles_own_order_at_5000_steps_and_at_the_end():
    assert f"{comparison.published_tau(5_000):.2f}" == "0.79"
    assert comparison.published_tau(156_000) == pytest.approx(1)


def test_taus_between_seeds():
    ours = [[0.1, 0.3, 0.1], [0.2, 0.2, 0.2], [0.3, 0.1, 0.4]]
    ours = [dict(enumerate(values)) for values in ours]
    assert comparison.taus_between_seeds(ours) == pytest.approx([-1, 1, -1])
    # A seed that one condition lacks is not taken for its neighbour.
    del ours[1][1]
    assert comparison.taus_between_seeds(ours) == pytest.approx([1])


def test_taus_of_seeds():
    ours = [[0.1, 0.3, 0.1], [0.2, 0.2, 0.3], [0.3, 0.1, 0.2]]
    ours = [dict(enumerate(values)) for values in ours]
    found = comparison.taus_of_seeds(ours, [1, 2, 3])
    assert found == pytest.approx([1, -1, 1 / 3])


def test_stability_finds_collapses_and_not_slopes():
    calm = np.linspace(0.1, 0.6, 100)
    fallen = calm.copy()
    fallen[[80, 90]] -= 0.2
    found = [
        comparison.stability(values[None])
        for values in (calm, fallen)
    ]
    assert found[0].deviation == pytest.approx(0, abs=1e-12)
    assert [x.collapses for x in found] == [(0,), (2,)]
    assert found[1].deviation > 0.02
    assert comparison.stability(calm[None, :20]) is None


def test_a_collapse_is_below_the_median_of_those_around():
    # Its own window has a mean of 0.49, and the median of the calm ones.
    accuracies = np.full(100, 0.5)
    accuracies[80] = 0.395
    found = comparison.stability(accuracies[None])
    assert found.collapses == (1,)

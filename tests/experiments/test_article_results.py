"""What is said of the article's conditions, from the files in this clone."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import article
from experiments import comparison
from experiments import report_summaries
from experiments import result_files

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "results/article_16_epochs"
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_TABLE = re.search("<!-- article -->\n(.*)<!-- /article -->", _README, re.S)
_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in _TABLE.group(1).splitlines()[2:]
]


def _evaluations(condition):
    """Of each seed, the lines of its file, by nothing but JSON."""
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(_RESULTS.glob(f"{condition}/*/metrics.jsonl"))
    ]


def _within(condition, step):
    """Of each seed, its accuracies within what the article's points span."""
    first, last = article.PUBLISHED_SPANS[step]
    return [
        [x["test_accuracy"] for x in own if first <= x["step"] <= last]
        for own in _evaluations(condition)
    ]


def _means(condition, step):
    return [np.mean(own) for own in _within(condition, step)]


def test_every_condition_with_results_has_a_row():
    found = {int(path.name) for path in _RESULTS.glob("[0-9]*")}
    assert [int(row[0]) for row in _ROWS] == sorted(found)
    assert found


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row[0])
def test_a_row_says_what_the_files_do(row):
    number, batch_norm, dropout, seeds, *values, recalibrated = row
    condition = article.condition(int(number))
    assert (batch_norm, float(dropout)) == (
        condition.batch_norm,
        condition.dropout,
    )
    assert len(_evaluations(number)) == int(seeds)
    published = article.PUBLISHED[condition.number]
    for step, (ours, theirs) in zip((2_000, 5_000), np.reshape(values, (2, 2))):
        means = _means(number, step)
        assert theirs == f"{published.at_step[step]:.3f}"
        assert ours.rstrip("*") == f"{np.mean(means):.3f}"
        spread = means if len(means) > 1 else _within(number, step)[0]
        allowed = 2 * math.hypot(
            np.std(spread, ddof=1), published.deviation_at_step[step]
        )
        off = abs(np.mean(means) - published.at_step[step])
        assert ours.endswith("*") == (off > allowed)
    answers = [
        json.loads(path.read_text())["test_accuracy"]
        for path in _RESULTS.glob(f"{number}/*/recalibrated.json")
    ]
    assert recalibrated == (f"{np.mean(answers):.3f}" if answers else "none")


def _order(step):
    """Kendall's tau, its interval and that between our seeds, as told."""
    ours = [_means(number, step) for number in range(12)]
    published = [article.PUBLISHED[n].at_step[step] for n in range(12)]
    tau = stats.kendalltau([np.mean(x) for x in ours], published).statistic
    rank = comparison.rank_order(ours, published)
    assert rank.tau == pytest.approx(tau)
    between = [
        stats.kendalltau(
            [x[one] for x in ours], [x[other] for x in ours]
        ).statistic
        for one, other in ((0, 1), (0, 2), (1, 2))
    ]
    return [f"{x:.2f}" for x in (tau, rank.low, rank.high, np.mean(between))]


def test_the_order_of_the_conditions_is_the_one_told():
    """By SciPy, and `README.md` has line breaks anywhere."""
    told = " ".join(_README.split())
    tau, low, high, between = _order(5_000)
    assert (
        f"is {tau} at 5,000 steps (95% interval {low} to {high}, a bootstrap "
        f"over three seeds, which is coarse), between two of our own seeds "
        f"{between}, the mean of three pairs;"
    ) in told
    tau, low, high, between = _order(2_000)
    assert f"at 2,000 steps {tau} ({low} to {high}) and {between}." in told


def test_whether_all_without_rank_below_all_with_it_is_told():
    told = " ".join(_README.split())
    below = {}
    for step in (2_000, 5_000):
        means = [np.mean(_means(number, step)) for number in range(12)]
        below[step] = max(means[:3]) < min(means[3:])
    assert all(below.values()) == (
        "All three conditions without batch normalization rank below all nine "
        "with it, at both steps." in told
    )


def test_how_far_the_conditions_are_off_is_told():
    off = {
        n: np.mean(_means(n, 5_000)) - article.PUBLISHED[n].at_step[5_000]
        for n in range(12)
    }
    within = sum(abs(x) <= 0.03 for x in off.values())
    told = " ".join(_README.split())
    assert f"{within} of 12 values are within 0.03" in told
    for number, difference in off.items():
        side = "below" if difference < 0 else "above"
        sentence = f"ondition {number} is {abs(difference):.3f} {side} it"
        assert (sentence in told) == (abs(difference) > 0.03)
    low = min(min(own) for own in _within(7, 5_000))
    high = max(max(own) for own in _within(7, 5_000))
    assert f"of condition 7 lie between {low:.3f} and {high:.3f}" in told


def _falls(accuracies):
    """Whether one evaluation is far below the one before it."""
    return np.diff(accuracies).min() < -0.15


def test_which_seeds_fall_is_told():
    """The moving averages of conditions 7 and 8 jump, not in all seeds."""
    told = " ".join(_README.split())
    (stays,) = (x for x in _within(7, 5_000) if not _falls(x))
    others = [x for x in _within(7, 5_000) if x != stays]
    assert [min(x) < 0.25 for x in others] == [True, True]
    assert (
        "two seeds fall below 0.25, the third does not fall and has "
        f"{np.mean(stays):.3f}"
    ) in told
    assert [_falls(x) for x in _within(8, 5_000)] == [True] * 3
    assert "In condition 8 all three seeds fall" in told
    recalibrated = {row[0]: row[-1] for row in _ROWS}
    at_end = [f"{article.PUBLISHED[n].at_step[5_000]:.3f}" for n in (7, 8)]
    assert (
        f"end the two have {recalibrated['7']} and {recalibrated['8']}, above "
        f"the article's {at_end[0]} and {at_end[1]}."
    ) in told


def test_the_report_has_the_same_numbers():
    """`comparison` against the arithmetic of this file."""
    summaries = report_summaries.summarize(result_files.read_runs(_RESULTS))
    for number, summary in summaries.items():
        assert summary.finished
        for found in comparison.at_published_steps(summary):
            assert found.complete
            assert found.mean == pytest.approx(
                np.mean(_means(number, found.step))
            )


def test_runs_are_of_one_setting():
    facts = [x.facts for x in result_files.read_runs(_RESULTS)]
    for name in ("steps", "eval_every", "backend", "input", "shuffle"):
        assert len({x[name] for x in facts}) == 1
    assert facts[0]["steps"] == 16 * article.BATCHES_PER_EPOCH
    assert (facts[0]["input"], facts[0]["shuffle"]) == ("raw", False)
    assert not any("dirty" in x["revision"] for x in facts)

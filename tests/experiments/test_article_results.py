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
from experiments import report_comparison
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
    """Kendall's tau and its interval, and those of parts, as told.

    Those are of one seed, between our seeds, and with batch normalization.
    """
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
    single = [
        stats.kendalltau([x[seed] for x in ours], published).statistic
        for seed in range(3)
    ]
    nine = stats.kendalltau([np.mean(x) for x in ours[3:]], published[3:])
    found = (
        *(tau, rank.low, rank.high),
        *(np.mean(single), np.mean(between), nine.statistic),
    )
    return [f"{x:.2f}" for x in found]


def test_the_order_of_the_conditions_is_the_one_told():
    """By SciPy, and `README.md` has line breaks anywhere."""
    told = " ".join(_README.split())
    tau, low, high, one, between, nine = _order(5_000)
    assert (
        f"is {tau} at 5,000 steps (95% interval {low} to {high}, a bootstrap "
        f"over three seeds, which is coarse), {one} for one seed, the mean of "
        f"three, and {between} between two of our own;"
    ) in told
    late = nine
    tau, low, high, one, between, nine = _order(2_000)
    assert (
        f"at 2,000 steps {tau} ({low} to {high}), {one} and {between}."
    ) in told
    assert f"alone it is {late} at 5,000 steps and {nine} at 2,000." in told


def test_whether_all_without_rank_below_all_with_it_is_told():
    told = " ".join(_README.split())
    below, seeds = {}, {}
    for step in (2_000, 5_000):
        of_seeds = np.array([_means(number, step) for number in range(12)])
        means = of_seeds.mean(axis=1)
        below[step] = max(means[:3]) < min(means[3:])
        highest, lowest = of_seeds[:3].max(axis=0), of_seeds[3:].min(axis=0)
        seeds[step] = (highest < lowest).sum()
    assert all(below.values()) == (
        "all three conditions without batch normalization rank below all nine "
        "with it, at both steps;" in told
    )
    assert (
        f"in {seeds[2_000]} of 3 at 2,000 steps and in {seeds[5_000]} of 3 at "
        "5,000, where seed 0 of condition 8 is below that of condition 2."
    ) in told
    assert of_seeds[8, 0] < of_seeds[2, 0]


def test_what_batch_normalization_has_in_common_is_told():
    told = " ".join(_README.split())
    off = {
        step: [
            np.mean(_means(n, step)) - article.PUBLISHED[n].at_step[step]
            for n in range(12)
        ]
        for step in (2_000, 5_000)
    }
    early, late = (-np.mean(off[step][3:]) for step in (2_000, 5_000))
    assert (
        f"conditions are {early:.3f} below the article's at 2,000 steps on "
        f"average and {late:.3f} below at 5,000, seven of nine both times."
    ) in told
    assert [sum(x < 0 for x in off[s][3:]) for s in (2_000, 5_000)] == [7, 7]
    within = sum(abs(x) <= 0.03 for x in off[2_000])
    assert f"At 2,000 steps {within} of 12 values are within 0.03" in told


# The mean of the article's two points between 5,616 and 6,240 steps, which
# stand at 5,760 and 6,150; of each condition.
_PUBLISHED_AT_THE_END = (
    *(0.4955, 0.5132, 0.5473, 0.6670, 0.6727, 0.6938),
    *(0.5552, 0.6647, 0.6722, 0.6887, 0.6445, 0.6875),
)


def test_how_far_the_last_evaluations_are_off_is_told():
    told = " ".join(_README.split())
    off = {}
    for number, published in enumerate(_PUBLISHED_AT_THE_END):
        lines = [x for own in _evaluations(number) for x in own[-5:]]
        assert {x["step"] for x in lines} == set(range(5_616, 6_241, 156))
        ours = np.mean([x["test_accuracy"] for x in lines])
        off[number] = ours - published
    assert max(abs(off[7]), abs(off[8])) < 0.003
    assert [n for n, x in off.items() if abs(x) > 0.03] == [6, 9, 10]
    assert (
        f"conditions 6, 9 and 10 are off by {off[6]:+.3f}, {off[9]:+.3f} and "
        f"{off[10]:+.3f}: it has two points there"
    ) in told


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


@pytest.mark.parametrize(
    ("step", "seeds"), [(2_000, "3 of 3"), (5_000, "2 of 3")]
)
def test_the_report_has_the_same_order(step, seeds):
    """Whose seeds hold is in README, and tested above."""
    contents = report_summaries.read_contents(_RESULTS, None)
    rows = re.findall("<tr>(.*?)</tr>", report_comparison.chapters(contents))
    (cells,) = (
        re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)
        for row in rows
        if f">{step:,}</th>" in row
    )
    tau, low, high, one, between, nine = _order(step)
    assert cells[3:] == [
        *(tau, f"{low} to {high}", f"{one} (3)", f"{between} (3)"),
        *(nine, "yes", seeds),
    ]


def test_runs_are_of_one_setting():
    facts = [x.facts for x in result_files.read_runs(_RESULTS)]
    for name in ("steps", "eval_every", "backend", "input", "shuffle"):
        assert len({x[name] for x in facts}) == 1
    assert facts[0]["steps"] == 16 * article.BATCHES_PER_EPOCH
    assert (facts[0]["input"], facts[0]["shuffle"]) == ("raw", False)
    assert not any("dirty" in x["revision"] for x in facts)

"""What is said of the control experiments, from the files in this clone."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import article
from experiments import control_results
from experiments import controls

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "results/article_16_epochs"
_CONTROL = controls.CONTROLS["input_and_order"]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def _rows(name):
    table = re.search(f"<!-- {name} -->\n(.*)<!-- /{name} -->", _README, re.S)
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.group(1).splitlines()[2:]
    ]


_ROWS = [
    *(["`input_and_order`", *row] for row in _rows("input_and_order")),
    *_rows("other controls"),
]
_ARMS = _rows("arms of input_and_order")


def _runs(control, name, condition):
    (arm,) = (arm for arm in control.arms if arm.name == name)
    own = controls.folder(_RESULTS, control, arm)
    return {int(path.name): path for path in own.glob(f"{condition}/*")}


def _evaluations(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(x)["test_accuracy"] for x in lines]


def _accuracy(run):
    """The mean of the last five evaluations, by nothing but JSON."""
    return np.mean(_evaluations(run)[-5:])


def _recalibrated(run):
    """Without batch normalization, the last evaluation."""
    path = run / "recalibrated.json"
    if not path.exists():
        return _evaluations(run)[-1]
    return json.loads(path.read_text())["test_accuracy"]


def _differences(control, claim, value=_accuracy):
    """Seed by seed, what the claim's runs come to."""
    terms = [(1, x) for x in claim.ours] + [(-1, x) for x in claim.others]
    runs = [_runs(control, *term) for _, term in terms]
    return [
        sum(
            sign * value(own[seed])
            for (sign, _), own in zip(terms, runs, strict=True)
        )
        for seed in sorted(set.intersection(*map(set, runs)))
    ]


def _has_batch_norm(claim):
    numbers = {number for _, number in (*claim.ours, *claim.others)}
    return any(article.condition(x).batch_norm != "none" for x in numbers)


def _points_and_interval(differences):
    found = 100 * np.array(differences)
    right = stats.ttest_1samp(found, 0).confidence_interval(0.95)
    return f"{found.mean():+.1f}", f"{right.low:+.1f} to {right.high:+.1f}"


def test_every_claim_that_was_measured_has_a_row():
    measured = [
        [f"`{control.name}`", claim.words]
        for control in controls.CONTROLS.values()
        if (_RESULTS / controls.FOLDER / control.name).exists()
        for claim in control.claims
        if len(_differences(control, claim)) > 1
    ]
    assert [row[:2] for row in _ROWS] == measured
    assert measured
    both = [
        arm.words
        for arm in _CONTROL.arms
        if all(_runs(_CONTROL, arm.name, number) for number in (0, 9))
    ]
    assert [row[0] for row in _ARMS] == both


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row[1])
def test_a_row_says_what_the_files_do(row):
    preset, words, points, interval, *recalibrated, seeds = row
    control = controls.CONTROLS[preset.strip("`")]
    (claim,) = (x for x in control.claims if x.words == words)
    found = _differences(control, claim)
    assert int(seeds) == len(found)
    assert (points, interval) == _points_and_interval(found)
    right = ("–", "–")
    if _has_batch_norm(claim):
        found = _differences(control, claim, _recalibrated)
        right = _points_and_interval(found)
    assert tuple(recalibrated) == right


@pytest.mark.parametrize("row", _ARMS, ids=lambda row: row[0])
def test_what_an_arm_comes_to(row):
    words, *means, recalibrated, seeds = row
    (arm,) = (arm for arm in _CONTROL.arms if arm.words == words)
    runs = [_runs(_CONTROL, arm.name, condition) for condition in (0, 9)]
    assert [set(own) for own in runs] == [set(range(int(seeds)))] * 2
    for mean, own in zip(means, runs, strict=True):
        assert mean == f"{np.mean([_accuracy(x) for x in own.values()]):.3f}"
    answers = [_recalibrated(run) for run in runs[1].values()]
    assert recalibrated == f"{np.mean(answers):.3f}"


def test_what_scaling_and_reshuffling_bring_is_what_the_files_say():
    bare, scaled = (
        np.mean([_accuracy(run) for run in _runs(_CONTROL, arm, 0).values()])
        for arm in ("raw_fixed", "standardized_reshuffled")
    )
    told = " ".join(_README.split())
    assert f"gains {100 * (scaled - bare):.1f} points" in told
    cells = {words: row for _, words, *row in _ROWS}
    gap = "Batch normalization (condition 9 less condition 0) on "
    raw = cells[gap + "raw pixels in fixed order"]
    both = cells[gap + "standardized pixels, reshuffled"]
    taken = "away of the gap on raw pixels in fixed order"
    alone = cells[f"What standardizing alone takes {taken}"]
    brings = cells[
        "Standardizing pixels without batch normalization (condition 0, "
        "fixed order)"
    ]
    order = cells[f"What reshuffling alone takes {taken}"]
    assert float(order[1].split(" to ")[0]) < 0 < float(order[1].split()[-1])
    brings_order = cells[
        "Reshuffling without batch normalization (condition 0, raw pixels)"
    ][0].lstrip("+")
    raw, both, alone, brings = (
        [cell.lstrip("+") for cell in row] for row in (raw, both, alone, brings)
    )
    assert f"Reshuffling alone brings {brings_order} without batch" in told
    ends = " and ".join(order[1].split(" to "))
    assert f"what it takes away of the gap lies between {ends}." in told
    assert f"alone takes away {alone[0]} of its {raw[0]} points" in told
    assert f"normalization it brings {brings[0]}." in told
    assert f"and {both[0]} of the {raw[0]} are left, which" in told
    assert f"it stays small, {both[2]} points" in told


def _includes_zero(interval):
    low, high = map(float, interval.split(" to "))
    return low < 0 < high


def test_what_dropout_brings_is_what_the_files_say():
    told = " ".join(_README.split())
    dropout = "Dropout 0.4 beside batch normalization (condition 11 less "
    dropout += "condition 9) on "
    rows = [row for _, words, *row in _ROWS if words.startswith(dropout)]
    raw, reshuffled, standardized, both = rows
    assert (
        f"gains {standardized[0][1:]} points on standardized pixels in fixed "
        "order; on the other three inputs no difference is shown."
    ) in told
    shown = [not _includes_zero(row[1]) for row in rows]
    assert shown == [False, False, True, False]


def test_what_is_left_after_16_epochs_is_what_the_files_say():
    told = " ".join(_README.split())
    later = _ROOT / "results/input_and_order_16_epochs/controls"
    standardized = "input_and_order/standardized_fixed"
    arms = {"raw": "article", "standardized": standardized}
    gaps = {}
    for arm, folder in arms.items():
        paths = [
            [later / folder / f"{condition}/{seed}" for seed in range(3)]
            for condition in (0, 9)
        ]
        for path in (*paths[0], *paths[1]):
            facts = json.loads((path / "run.json").read_text())
            assert facts["steps"] == 16 * article.BATCHES_PER_EPOCH
            assert (facts["input"], facts["shuffle"]) == (arm, False)
            assert "dirty" not in facts["revision"]
        bare, normalized = (
            [[f(path) for path in own] for f in (_accuracy, _recalibrated)]
            for own in paths
        )
        gaps[arm] = np.subtract(normalized, bare)
    gaps["taken"] = gaps["raw"] - gaps["standardized"]
    raw, standardized, taken = (
        [
            "{} ({})".format(*_points_and_interval(x)).replace("+", "")
            for x in gaps[arm]
        ]
        for arm in ("raw", "standardized", "taken")
    )
    assert (
        f"gap of {raw[0]} on raw pixels, {standardized[0]} on standardized "
        f"ones, and of the difference, {taken[0]},"
    ) in told
    assert (
        f"Recalibrated they are {raw[1]}, {standardized[1]} and {taken[1]}."
    ) in told
    # Raw ones are the runs of the article's table.
    for condition, seed in itertools.product((0, 9), range(3)):
        run = f"{condition}/{seed}/metrics.jsonl"
        assert (later / "article" / run).read_bytes() == (
            _RESULTS / run
        ).read_bytes()


def test_how_the_gap_goes_on_is_what_the_files_say():
    """The article's settings beyond the steps of the controls."""
    told = " ".join(_README.split())
    first, last = article.PUBLISHED_SPANS[5_000]
    means = {}
    for condition in (0, 9):
        values = []
        for path in sorted(_RESULTS.glob(f"{condition}/*/metrics.jsonl")):
            lines = list(map(json.loads, path.read_text().splitlines()))
            values += [
                x["test_accuracy"] for x in lines if first <= x["step"] <= last
            ]
            # The controls' run is its beginning.
            shared = _evaluations(
                _RESULTS / f"controls/article/{condition}/{path.parent.name}"
            )
            assert [x["test_accuracy"] for x in lines][: len(shared)] == shared
        means[condition] = np.mean(values)
    gap = 100 * (means[9] - means[0])
    assert f"wider: it is {gap:.1f} points at 5,000 steps" in told


def test_what_the_other_controls_come_to_is_what_the_files_say():
    told = " ".join(_README.split())
    cells = {words: row for _, words, *row in _ROWS}
    of_images = cells[
        "Batch normalization of the images alone (against none, condition 0)"
    ]
    of_all = cells[
        "Batch normalization of all layers against that of the images alone"
    ]
    before = cells[
        "Batch normalization before the activation instead of after it "
        "(condition 9)"
    ]
    slower = cells["A learning rate of 0.0001 instead of 0.001, in condition 0"]
    left = cells[
        "Batch normalization at a learning rate of 0.001 against none at 0.0001"
    ]
    slow = cells[
        "Batch normalization (condition 9 less condition 0) at a learning rate "
        "of 0.0001"
    ]
    faster = cells["A learning rate of 0.01 instead of 0.001, in condition 9"]
    for sentence in (
        f"alone, and of no layer, gains {of_images[0][1:]} points",
        f"and has {of_all[0][1:]} more than that of all layers",
        f"activation it has {before[0][1:]} points less than after it",
        f"without it gains {slower[0][1:]} points",
        f"left of the gap then is {slow[0][1:]} points "
        f"({slow[1].replace('+', '')}) if",
        f"if it stays at 0.001, {left[0][1:]} points, which",
        f"recalibrated it is {left[2][1:]}.",
    ):
        assert sentence in told
    # (Points, interval) twice, with moving and with recalibrated statistics.
    assert [of_images[0][0], of_all[0][0], before[0][0]] == ["+", "-", "-"]
    for told_apart in (of_images[1], of_all[1], before[1], slower[1], left[3]):
        assert not _includes_zero(told_apart)
    layers = [
        cells[f"Our layer instead of Keras's (condition {number})"]
        for number in (9, 11)
    ]
    assert "in the place of ours makes no difference that is shown; " in told
    lowest = layers[0][1].split(" to ")[0]
    assert f"; {lowest[1:]} points less with ours, in condition 9," in told
    for not_shown in (
        of_all[3],
        before[3],
        left[1],
        faster[1],
        *(row[column] for row in layers for column in (1, 3)),
    ):
        assert _includes_zero(not_shown)
    control = controls.CONTROLS["learning_rate"]
    guesses = _runs(control, "rate_0.01", 0).values()
    assert {f"{_accuracy(run):.3f}" for run in guesses} == {"0.100"}


def test_the_report_has_the_same_numbers():
    """`control_results` against the arithmetic of this file."""
    said = {
        said
        for results in control_results.read(_RESULTS)
        for said in results.verdicts()
    }
    for preset, words, *_ in _ROWS:
        control = controls.CONTROLS[preset.strip("`")]
        (claim,) = (x for x in control.claims if x.words == words)
        found = _differences(control, claim)
        (verdict,) = (x for x in said if x.startswith(f"{words}: "))
        assert f": {100 * np.mean(found):+.1f} points" in verdict
        assert f"over {len(found)} seeds" in verdict


def test_runs_differ_in_their_arms_alone():
    for control in controls.CONTROLS.values():
        for arm in control.arms:
            own = controls.folder(_RESULTS, control, arm)
            for path in own.glob("*/*/run.json"):
                facts = json.loads(path.read_text())
                assert facts["steps"] == 8 * article.BATCHES_PER_EPOCH
                assert "dirty" not in facts["revision"]
                expected = {
                    "input": "raw",
                    "shuffle": False,
                    "learning_rate": 0.001,
                    "placement": "after",
                    "layer": "keras_bn",
                    **arm.changes,
                }
                assert {x: facts[x] for x in expected} == expected

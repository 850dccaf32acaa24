"""What is said of the control experiments, from the files in this clone."""

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


_ROWS = _rows("input_and_order")
_ARMS = _rows("arms of input_and_order")


def _runs(name, condition):
    (arm,) = (arm for arm in _CONTROL.arms if arm.name == name)
    own = controls.folder(_RESULTS, _CONTROL, arm)
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


def _differences(claim, value=_accuracy):
    """Seed by seed, what the claim's runs come to."""
    terms = [(1, x) for x in claim.ours] + [(-1, x) for x in claim.others]
    runs = [_runs(*term) for _, term in terms]
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
    measured = [x.words for x in _CONTROL.claims if len(_differences(x)) > 1]
    assert [row[0] for row in _ROWS] == measured
    assert measured
    arms = {x for c in _CONTROL.claims if _differences(c) for x, _ in c.ours}
    words = [arm.words for arm in _CONTROL.arms if arm.name in arms]
    assert [row[0] for row in _ARMS] == words


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row[0])
def test_a_row_says_what_the_files_do(row):
    words, points, interval, *recalibrated, seeds = row
    (claim,) = (x for x in _CONTROL.claims if x.words == words)
    found = _differences(claim)
    assert int(seeds) == len(found)
    assert (points, interval) == _points_and_interval(found)
    right = ("–", "–")
    if _has_batch_norm(claim):
        right = _points_and_interval(_differences(claim, _recalibrated))
    assert tuple(recalibrated) == right


@pytest.mark.parametrize("row", _ARMS, ids=lambda row: row[0])
def test_what_an_arm_comes_to(row):
    words, *means, recalibrated, seeds = row
    (arm,) = (arm for arm in _CONTROL.arms if arm.words == words)
    runs = [_runs(arm.name, condition) for condition in (0, 9)]
    assert [set(own) for own in runs] == [set(range(int(seeds)))] * 2
    for mean, own in zip(means, runs, strict=True):
        assert mean == f"{np.mean([_accuracy(x) for x in own.values()]):.3f}"
    answers = [_recalibrated(run) for run in runs[1].values()]
    assert recalibrated == f"{np.mean(answers):.3f}"


def test_what_scaling_and_reshuffling_bring_is_what_the_files_say():
    bare, scaled = (
        np.mean([_accuracy(run) for run in _runs(arm, 0).values()])
        for arm in ("raw_fixed", "standardized_reshuffled")
    )
    told = " ".join(_README.split())
    assert f"gains {100 * (scaled - bare):.1f} points" in told
    points = {words: cells[0].lstrip("+") for words, *cells in _ROWS}
    right = {words: cells[2].lstrip("+") for words, *cells in _ROWS}
    raw, both, _, _, alone, brings = points
    assert f"alone takes away {points[alone]} of its {points[raw]} poi" in told
    assert f"normalization it brings {points[brings]}." in told
    assert f"and {points[both]} of the {points[raw]} are left, which" in told
    assert f"it stays small, {right[both]} points" in told


def test_the_report_has_the_same_numbers():
    """`control_results` against the arithmetic of this file."""
    found = control_results.read(_RESULTS)
    (results,) = (x for x in found if x.control == _CONTROL)
    for claim, said in zip(_CONTROL.claims, results.verdicts(), strict=True):
        found = _differences(claim)
        if len(found) > 1:
            assert f": {100 * np.mean(found):+.1f} points" in said
            assert f"over {len(found)} seeds" in said


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

"""What is said of the control experiments, from the files in this clone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import article
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


def _runs(arm, condition):
    return {
        int(path.name): path
        for path in (_RESULTS / "controls" / _CONTROL.name / arm).glob(
            f"{condition}/*"
        )
    }


def _accuracy(run):
    """The mean of the last five evaluations, by nothing but JSON."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return np.mean([json.loads(x)["test_accuracy"] for x in lines[-5:]])


def _differences(claim):
    """Seed by seed, what the claim's runs come to."""
    terms = [(1, x) for x in claim.ours] + [(-1, x) for x in claim.others]
    runs = [_runs(*term) for _, term in terms]
    return [
        sum(
            sign * _accuracy(own[seed])
            for (sign, _), own in zip(terms, runs, strict=True)
        )
        for seed in sorted(set.intersection(*map(set, runs)))
    ]


def test_every_claim_that_was_measured_has_a_row():
    measured = [x.words for x in _CONTROL.claims if len(_differences(x)) > 1]
    assert [row[0] for row in _ROWS] == measured
    assert measured
    arms = {x for c in _CONTROL.claims if _differences(c) for x, _ in c.ours}
    words = [arm.words for arm in _CONTROL.arms if arm.name in arms]
    assert [row[0] for row in _ARMS] == words


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row[0])
def test_a_row_says_what_the_files_do(row):
    words, points, interval, seeds = row
    (claim,) = (x for x in _CONTROL.claims if x.words == words)
    found = 100 * np.array(_differences(claim))
    right = stats.ttest_1samp(found, 0).confidence_interval(0.95)
    assert int(seeds) == len(found)
    assert points == f"{found.mean():+.1f}"
    assert interval == f"{right.low:+.1f} to {right.high:+.1f}"


@pytest.mark.parametrize("row", _ARMS, ids=lambda row: row[0])
def test_what_an_arm_comes_to(row):
    words, *means, recalibrated, seeds = row
    (arm,) = (arm for arm in _CONTROL.arms if arm.words == words)
    runs = [_runs(arm.name, condition) for condition in (0, 9)]
    assert [set(own) for own in runs] == [set(range(int(seeds)))] * 2
    assert means == [
        f"{np.mean([_accuracy(run) for run in own.values()]):.3f}"
        for own in runs
    ]
    answers = [
        json.loads((run / "recalibrated.json").read_text())["test_accuracy"]
        for run in runs[1].values()
    ]
    assert recalibrated == f"{np.mean(answers):.3f}"


def test_the_report_has_the_same_numbers():
    """`controls` against the arithmetic of this file."""
    (results,) = controls.read(_RESULTS)
    for claim in _CONTROL.claims:
        found = _differences(claim)
        said = controls.verdict(claim, results.difference(claim))
        if len(found) > 1:
            assert f": {100 * np.mean(found):+.1f} points" in said
            assert f"over {len(found)} seeds" in said


def test_runs_differ_in_their_arms_alone():
    for arm in _CONTROL.arms:
        for condition in _CONTROL.conditions:
            for run in _runs(arm.name, condition).values():
                facts = json.loads((run / "run.json").read_text())
                assert facts["steps"] == 8 * article.BATCHES_PER_EPOCH
                assert facts["learning_rate"] == 0.001
                assert "dirty" not in facts["revision"]
                expected = {"input": "raw", "shuffle": False} | arm.changes
                assert {x: facts[x] for x in expected} == expected

"""What was measured, and what is said of it, from the files in this clone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import report_studies
from experiments import studies
from experiments.studies import records
from experiments.studies import verdict
from experiments.studies.study import KERAS

_ROOT = Path(__file__).parents[3]
_FOUND = {x.study.name: x for x in report_studies.read(_ROOT / "results")}


# A study that was not measured yet has nothing to be wrong.
_each = pytest.mark.parametrize("name", studies.NAMES)


def _answers(name):
    return _FOUND[name].answers if name in _FOUND else []


def _raw(name):
    """(arm, seed) -> the line's lists, by nothing but JSON."""
    path = _ROOT / "results/studies" / name / records.FILE
    lines = map(json.loads, path.read_text().splitlines())
    return {(x["facts"]["arm"], x["facts"]["seed"]): x for x in lines}


@_each
def test_verdicts_are_made_of_the_files(name):
    """Each answer anew, by SciPy, from the study's quantities."""
    outcomes = set()
    for answer in _answers(name):
        results, raw = _FOUND[name], _raw(name)
        question = answer.question
        terms = (*question.ours, *question.others)
        of_seeds = results.quantities
        if not all(term in of_seeds for term in terms):
            assert answer.outcome == verdict.NOT_ASSESSED
            continue
        seeds = set.intersection(*(set(of_seeds[x]) for x in terms))
        differences = [
            question.factor
            * (
                sum(_value(raw, of_seeds, x, seed) for x in question.ours)
                - sum(_value(raw, of_seeds, x, seed) for x in question.others)
            )
            for seed in sorted(seeds)
        ]
        right = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert answer.difference.low == pytest.approx(right.low, abs=1e-9)
        if answer.outcome == verdict.NOT_ASSESSED:
            continue
        outcomes.add(answer.outcome)
        least = question.minimum
        holds = right.low > min(0, least) and np.mean(differences) >= least
        if question.same:
            holds = -least < right.low and right.high < least
        assert (answer.outcome == verdict.SUPPORTED) == holds
        for arm in question.reference:
            assert _flat(raw, arm)
    if name in _FOUND:
        (expected,) = outcomes if len(outcomes) == 1 else [verdict.DEPENDS]
        if not outcomes:
            expected = verdict.NOT_ASSESSED
        assert _FOUND[name].verdict.startswith(expected)


def _value(raw, quantities, name, seed):
    """A quantity; where it is an arm's accuracy, from the file alone."""
    line = raw.get((name, seed))
    if line is None or "test_accuracy" not in line["lines"]:
        return quantities[name][seed]
    values = line["lines"]["test_accuracy"]
    right = np.mean(values[-round(len(values) / 4) :])
    assert quantities[name][seed] == pytest.approx(right)
    return right


def _flat(raw, arm):
    losses = [
        [np.nan if x is None else x for x in line["lines"]["test_loss"]]
        for (name, _), line in raw.items()
        if name == arm
    ]
    loss = np.mean(losses, axis=0)
    quarter = round(len(loss) / 4)
    last = np.mean(loss[-quarter:])
    before = np.mean(loss[-2 * quarter : -quarter])
    return not before - last > max(0.05 * (loss[0] - last), 0.01)


@_each
def test_a_wrong_sign_in_these_files_turns_the_answers(name, tmp_path):
    """What a question adds, and what it takes away, change names."""
    for number, answer in enumerate(_answers(name)):
        study, question = _FOUND[name].study, answer.question
        raw = _raw(name)
        arms = {arm for arm, _ in raw}
        swapped = dict(zip(question.ours, question.others))
        swapped |= dict(zip(question.others, question.ours))
        if not swapped or not set(swapped) <= arms:
            continue  # not the accuracies of arms
        if answer.outcome != verdict.SUPPORTED:
            continue
        lines = []
        for (arm, _), line in raw.items():
            # Steps and losses stay: what they are of has flattened, or not.
            other = raw[swapped.get(arm, arm), line["facts"]["seed"]]
            loss = other["lines"]["test_loss"]
            columns = {**line["lines"], "test_loss": loss}
            facts = other["facts"]
            lines.append(json.dumps({**line, "facts": facts, "lines": columns}))
        folder = study.folder(tmp_path / str(number))
        folder.mkdir(parents=True)
        (folder / records.FILE).write_text("\n".join(lines))
        turned = study.read(tmp_path / str(number)).answers[number]
        assert turned.difference.mean == pytest.approx(-answer.difference.mean)
        if question.minimum > 0 and not question.same:
            assert turned.outcome == verdict.NOT_SUPPORTED


@_each
def test_what_is_found_against_a_claim_is_no_mistake_of_our_layer(name):
    """It was asked with Keras's layer too, which never says the opposite."""
    outcomes = [x.outcome for x in _answers(name)]
    theirs = _FOUND[name].answers_of_keras if name in _FOUND else []
    assert theirs or verdict.NOT_SUPPORTED not in outcomes
    opposites = {verdict.SUPPORTED, verdict.NOT_SUPPORTED}
    for ours, their in zip(outcomes, theirs):
        assert {ours, their.outcome} != opposites


@_each
def test_what_was_measured_is_the_real_setting(name):
    study = studies.find(name)
    wanted = {x.arm: x for x in study.settings(False, "keras_bn")}
    runs = _FOUND[name].runs if name in _FOUND else {}
    for arm, own in runs.items():
        for record in own.values():
            for fact in ("steps", "learning_rate", "train_images"):
                asked = getattr(wanted[arm.removesuffix(KERAS)], fact)
                assert record.facts[fact] == asked
        path = study.folder(_ROOT / "results") / records.FILE
        assert path.stat().st_size < 500_000


def test_the_readme_has_the_table():
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    marked = "<!-- studies -->\n(.*)<!-- /studies -->"
    (table,) = re.findall(marked, readme, re.S)
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    expected = report_studies.markdown_rows(list(_FOUND.values()))
    assert rows == expected

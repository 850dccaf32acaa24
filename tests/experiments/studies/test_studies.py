"""What all studies have in common, on results that nobody measured."""

import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from experiments import ExperimentError
from experiments import report
from experiments import studies
from experiments.studies import __main__ as program
from experiments.studies import records
from experiments.studies import verdict
from tests.experiments.studies import study_files

_STUDIES = [studies.find(name) for name in studies.NAMES]
_each = pytest.mark.parametrize("study", _STUDIES, ids=studies.NAMES)


def _some(settings, generator):
    """A value that hangs on the arm and, by little, on the seed."""
    arm = sum(map(ord, settings.arm)) % 7
    return 0.4 + 0.02 * arm + 0.001 * generator.standard_normal()


@_each
def test_the_shape(study):
    assert study.name in studies.NAMES
    names = [arm.name for arm in study.arms]
    assert len(set(names)) == len(names)
    assert study.questions and study.claim.endswith(".")
    for question in study.questions:
        assert set(question.reference) <= set(names)
        assert question.minimum and question.when
    real, quick = (study.settings(x, "keras_bn") for x in (False, True))
    assert {x.arm for x in quick} <= {x.arm for x in real} == set(names)
    assert len(set(real)) == len(real)
    # Nothing is told of one seed.
    assert min(study.real.seeds, study.quick.seeds) >= 2
    # The whole grid is a matter of seconds.
    assert sum(x.steps for x in quick) < 2_000


@_each
def test_every_question_is_answered_and_drawn(study, tmp_path):
    study_files.write(study, tmp_path, _some)
    results = study.read(tmp_path)
    for answer in results.answers:
        assert answer.difference is not None
        assert answer.difference.count == study.real.seeds
        assert answer.reason != "the loss of none still falls"
    svg = study.figure(results)
    assert "<title>" in svg and svg.endswith("</svg>\n")
    assert study.caption(results).endswith(".")


@_each
def test_answers_are_those_of_scipy(study, tmp_path):
    """Where the quantities are accuracies, from the file alone."""
    study_files.write(study, tmp_path, _some)
    runs = records.read(study.folder(tmp_path))
    arms, checked = {arm.name for arm in study.arms}, 0
    for answer in study.read(tmp_path).answers:
        question = answer.question
        terms = (*question.ours, *question.others)
        if not set(terms) <= arms or question.factor != 100:
            continue
        differences = [
            100
            * (
                sum(_accuracy(runs[x][seed]) for x in question.ours)
                - sum(_accuracy(runs[x][seed]) for x in question.others)
            )
            for seed in range(study.real.seeds)
        ]
        right = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert answer.difference.low == pytest.approx(right.low)
        assert answer.difference.high == pytest.approx(right.high)
        checked += 1
    others = ("convergence", "covariate_shift", "learning_rate", "cost")
    assert checked or study.name in others


def _accuracy(record):
    return np.mean(record.lines["test_accuracy"][-4:])


@_each
def test_digits_are_never_assessed(study, tmp_path):
    study_files.write(study, tmp_path, _some, dataset="digits")
    results = study.read(tmp_path)
    assert results.verdict == verdict.NOT_ASSESSED
    assert {x.reason for x in results.answers} == {"measured on digits"}


@_each
def test_the_quick_setting_is_never_assessed(study, tmp_path):
    study_files.write(study, tmp_path, _some, steps=3)
    results = study.read(tmp_path)
    assert results.verdict == verdict.NOT_ASSESSED


def _favouring(name):
    """Values of a study in which one arm is ten points better."""

    def value(settings, generator):
        better = 0.1 * (settings.arm == name)
        return 0.5 + better + 0.001 * generator.standard_normal()

    return value


def test_a_wrong_sign_in_the_file_turns_the_verdict(tmp_path):
    study = studies.find("older_remedies")
    study_files.write(study, tmp_path, _favouring("batch"))
    assert study.read(tmp_path).verdict == verdict.SUPPORTED
    path = study.folder(tmp_path) / records.FILE
    text = path.read_text()
    # What batch normalization gained, it loses now.
    wrong = re.sub(
        r'"arm": "batch".*?"test_accuracy": \[(.*?)\]',
        lambda m: re.sub(r"0\.(6|59)\d*", "0.4", m.group()),
        text,
    )
    assert wrong != text
    path.write_text(wrong)
    assert study.read(tmp_path).verdict == verdict.NOT_SUPPORTED


def test_keras_layer_stands_in_for_ours(tmp_path):
    study = studies.find("older_remedies")
    study_files.write(study, tmp_path, _favouring("batch"))
    assert not study.read(tmp_path).answers_of_keras
    study_files.write(study, tmp_path, _favouring("nobody"), layer="keras")
    results = study.read(tmp_path)
    assert results.verdict == verdict.SUPPORTED
    theirs = {x.outcome for x in results.answers_of_keras}
    assert theirs == {verdict.NOT_SUPPORTED}
    # And only what has a batch normalization of its kind is run.
    arms = {x.arm for x in study.settings(False, "keras")}
    assert arms == {"batch@keras"}


def test_cost_times_all_once_more_beside_keras_layer():
    """Timings of another day would not do for a comparison."""
    ours, theirs = (
        studies.find("cost").settings(False, x) for x in ("keras_bn", "keras")
    )
    assert [f"{x.arm}@keras" for x in ours] == [x.arm for x in theirs]
    assert {x.architecture.layer for x in theirs} == {"keras"}


def test_the_report_has_a_table_and_chapters(tmp_path):
    study = studies.find("older_remedies")
    study_files.write(study, tmp_path, _favouring("batch"))
    study_files.write(studies.find("placement"), tmp_path, _some)
    page = report.write_report(tmp_path).read_text()
    table = page.index("claims, measured</h2>")
    first = page.index("Study: Placement</h2>")
    assert table < first < page.index("Study: Older remedies</h2>")
    assert "python -m experiments.studies older_remedies" in page
    assert "Verdict: supported." in page
    assert "What would change it:" in page
    assert (tmp_path / "figures/study_placement.svg").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not a record of a run"),
        ('{"facts": {}, "lines": {}, "measures": {}}', "line 1"),
        ('{"facts": 3, "lines": {}, "measures": {}}', "line 1"),
    ],
)
def test_damaged_records(tmp_path, line, said):
    study = studies.find("cost")
    study.folder(tmp_path).mkdir(parents=True)
    (study.folder(tmp_path) / records.FILE).write_text(line)
    with pytest.raises(ExperimentError, match=said):
        study.read(tmp_path)


def test_records_that_do_not_belong_together(tmp_path):
    study = studies.find("cost")
    study_files.write(study, tmp_path, _some)
    study_files.write(study, tmp_path, _some, layer="keras", backend="jax")
    with pytest.raises(ExperimentError, match="differ in backend"):
        study.read(tmp_path)


def test_names():
    assert program.names(["all"]) == list(studies.NAMES)
    assert program.names(["cost", "transfer"]) == ["cost", "transfer"]
    for wrong in ([], ["costs"], ["all", "cost"]):
        with pytest.raises(ExperimentError, match="name studies: all, or"):
            program.names(wrong)


def test_the_program_says_what_it_takes():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.studies", "nothing"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: name studies: all, or any of")
    assert "Received: nothing" in done.stderr

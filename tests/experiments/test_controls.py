"""Control experiments: what is asked of results, and the verdicts."""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy import stats

from experiments import ExperimentError
from experiments import control_results
from experiments import controls
from experiments import report
from experiments.run_settings import Settings
from tests.experiments import run_files

_CONTROL = controls.CONTROLS["input_and_order"]


def _write(output, arm, condition, seed, accuracy, **facts):
    """A finished run whose last evaluations have a mean of `accuracy`."""
    changes = {a.name: a.changes for a in _CONTROL.arms}[arm]
    run_files.write_run(
        controls.folder(output, _CONTROL, _arm(arm)),
        condition,
        seed,
        [0.1] * 15 + list(accuracy + np.array([0.02, -0.01, 0, 0, -0.01])),
        every=156,
        **{"eval_every": 156, "steps": 3120, **changes, **facts},
    )


def _arm(name):
    return next(arm for arm in _CONTROL.arms if arm.name == name)


def _gaps(output, raw, scaled, **facts):
    """Runs in which normalization brings so much on either input."""
    noise = (0.0, 0.004, -0.003, 0.001, 0.002)
    for seed, off in enumerate(noise):
        for arm, gap in (
            ("raw_fixed", raw),
            ("standardized_reshuffled", scaled),
        ):
            _write(output, arm, 0, seed, 0.5 + off, **facts)
            _write(output, arm, 9, seed, 0.5 + gap - off, **facts)


_GAP = "Batch normalization (condition 9 less condition 0) on "
_TAKEN = " away of the gap on raw pixels in fixed order"


def _verdicts(output):
    """Words of a claim -> what is said of it after them."""
    (results,) = control_results.read(output)
    return {
        claim.words: said.removeprefix(f"{claim.words}: ")
        for claim, said in zip(
            results.control.claims, results.verdicts(), strict=True
        )
    }


def test_the_gap_and_what_scaling_takes_away_of_it(tmp_path):
    _gaps(tmp_path, 0.1, 0.0)
    said = _verdicts(tmp_path)
    off = -2 * np.array([0.0, 0.004, -0.003, 0.001, 0.002])
    right = stats.ttest_1samp(0.1 + off, 0).confidence_interval(0.95)
    assert said.pop(f"{_GAP}raw pixels in fixed order") == (
        f"{100 * np.mean(0.1 + off):+.1f} points of test accuracy, 95% "
        f"interval {100 * right.low:+.1f} to {100 * right.high:+.1f} over 5 "
        "seeds: the interval excludes 0."
    )
    scaled = said.pop(f"{_GAP}standardized pixels, reshuffled")
    assert scaled.endswith("no difference is shown.")
    taken = said.pop(f"What standardizing and reshuffling take{_TAKEN}")
    assert taken.startswith("+10.0 points")
    assert set(said.values()) == {"not measured yet."}


def test_a_wrong_sign_turns_the_verdict(tmp_path):
    _gaps(tmp_path, -0.1, 0.0)
    said = _verdicts(tmp_path)
    taken = f"What standardizing and reshuffling take{_TAKEN}"
    for words in (f"{_GAP}raw pixels in fixed order", taken):
        assert said[words].startswith("-")
        assert said[words].endswith("the interval excludes 0.")


def test_scaling_is_told_from_reshuffling(tmp_path):
    """All of the gap goes with the order of the batches, none by scaling."""
    _gaps(tmp_path, 0.1, 0.0)
    for seed in range(5):
        _write(tmp_path, "standardized_fixed", 0, seed, 0.5)
        _write(tmp_path, "standardized_fixed", 9, seed, 0.6 + seed / 1000)
    said = _verdicts(tmp_path)
    both = said[f"What standardizing and reshuffling take{_TAKEN}"]
    assert both.endswith("the interval excludes 0.")
    left = said[f"{_GAP}standardized pixels in fixed order"]
    assert left.startswith("+10.2 points")
    alone = said[f"What standardizing alone takes{_TAKEN}"]
    assert alone.endswith("no difference is shown.")


def test_statistics_that_are_right_are_compared_too(tmp_path):
    """Without batch normalization the last evaluation is what there is."""
    _gaps(tmp_path, 0.1, 0.0)
    noise = np.array([0.001, -0.002, 0.003, 0.0, 0.001])
    for path in tmp_path.glob("controls/article/9/*"):
        answer = {"test_accuracy": 0.7 + noise[int(path.name)]}
        (path / "recalibrated.json").write_text(json.dumps(answer))
    said = _verdicts(tmp_path)
    # The last evaluation of seed 0 is 0.5 - 0.01, and so on.
    bare = 0.49 + np.array([0.0, 0.004, -0.003, 0.001, 0.002])
    off = 100 * (0.7 + noise - bare)
    right = stats.ttest_1samp(off, 0).confidence_interval(0.95)
    assert said[f"{_GAP}raw pixels in fixed order"].endswith(
        "the interval excludes 0. At the last step, with recalibrated "
        "statistics: "
        f"{off.mean():+.1f} points of test accuracy, 95% interval "
        f"{right.low:+.1f} to {right.high:+.1f} over 5 seeds."
    )
    scaled = said[f"{_GAP}standardized pixels, reshuffled"]
    assert "recalibrated" not in scaled


def test_controls_share_the_runs_of_the_articles_settings(tmp_path):
    _gaps(tmp_path, 0.1, 0.0)
    control = controls.CONTROLS["learning_rate"]
    (article,) = (x for x in control.arms if x.name == "rate_0.001")
    (other,) = (x for x in control.arms if x.name == "rate_0.01")
    run_files.write_run(
        controls.folder(tmp_path, control, other),
        9,
        0,
        [0.4] * 20,
        every=156,
        **{"eval_every": 156, "steps": 3120, **other.changes},
    )
    first, second = control_results.read(tmp_path)
    assert first.control == _CONTROL
    assert second.control == control
    shared = second.runs[article.name]
    assert [x.facts for x in shared] == [
        x.facts for x in first.runs["raw_fixed"]
    ]
    said = second.verdicts()
    assert "of one seed" in said[-1]
    assert "-20.0 points" in said[-1]
    page = report.write_report(tmp_path).read_text()
    # The verdict on the article's own rate is of five seeds of both.
    assert "--preset=learning_rate --seeds=5 " in page
    assert "21 runs of control experiments." in page


def test_what_other_controls_change_is_not_looked_at(tmp_path):
    """Of the controls that have no runs but the article's settings."""
    run_files.write_run(tmp_path / "controls/article", 9, 0, [0.5], steps=100)
    for rate in (0.5, 0.001):
        path = tmp_path / "controls/article/9/0/run.json"
        facts = json.loads(path.read_text()) | {"learning_rate": rate}
        path.write_text(json.dumps(facts))
        assert control_results.read(tmp_path) == []
    with pytest.raises(ExperimentError, match="beside those of the article's"):
        report.write_report(tmp_path)


def test_the_articles_settings_alone_answer_nothing(tmp_path):
    _write(tmp_path, "raw_fixed", 0, 0, 0.5)
    assert control_results.read(tmp_path) == []


def test_the_command_makes_all_that_is_told(tmp_path):
    """Condition 11 has runs of the article's settings alone."""
    _gaps(tmp_path, 0.1, 0.0)
    page = report.write_report(tmp_path).read_text()
    assert "--preset=input_and_order --conditions=0,9 --seeds=5 " in page
    _write(tmp_path, "raw_fixed", 11, 0, 0.6)
    page = report.write_report(tmp_path).read_text()
    assert "--preset=input_and_order --seeds=5 " in page
    assert "with RESULTS the folder of this report" in page


def test_what_no_arm_changes_is_not_named_after_one(tmp_path):
    control = controls.CONTROLS["placement"]
    for arm in control.arms:
        for number in (0, 9) if arm.name == "after" else (9,):
            run_files.write_run(
                controls.folder(tmp_path, control, arm),
                number,
                0,
                [0.5] * 20,
                every=156,
                **{"eval_every": 156, "steps": 3120, **arm.changes},
            )
    page = report.write_report(tmp_path).read_text()
    assert "0, no batch normalization: 0.500" in page
    assert "0, after the activation" not in page
    assert "9, after the activation (article): 0.500" in page


def test_one_seed_gives_no_verdict(tmp_path):
    _write(tmp_path, "standardized_fixed", 9, 0, 0.5)
    _write(tmp_path, "raw_fixed", 0, 0, 0.5)
    _write(tmp_path, "raw_fixed", 9, 0, 0.6)
    said = _verdicts(tmp_path)[f"{_GAP}raw pixels in fixed order"]
    assert said.endswith("hence no verdict.")


def test_seeds_are_paired(tmp_path):
    _write(tmp_path, "standardized_fixed", 9, 0, 0.5)
    _write(tmp_path, "raw_fixed", 0, 0, 0.5)
    _write(tmp_path, "raw_fixed", 9, 1, 0.6)
    said = _verdicts(tmp_path)[f"{_GAP}raw pixels in fixed order"]
    assert said.endswith("not measured yet.")


def test_arms_may_differ_in_what_they_are_for_alone(tmp_path):
    _gaps(tmp_path, 0.1, 0.0)
    _write(tmp_path, "raw_fixed", 11, 0, 0.5, optimizer="sgd")
    with pytest.raises(ExperimentError, match="differ in optimizer"):
        control_results.read(tmp_path)


def test_runs_are_what_their_arm_says(tmp_path):
    _write(tmp_path, "raw_reshuffled", 0, 0, 0.5)
    _write(tmp_path, "raw_fixed", 0, 0, 0.5, input="standardized")
    said = "article has a run whose input is standardized; .* it is raw"
    with pytest.raises(ExperimentError, match=said):
        control_results.read(tmp_path)


def test_a_chapter_says_what_it_was_measured_on(tmp_path):
    digits = {"dataset": "digits", "dataset_version": "1.7", "backend": "jax"}
    digits |= {"processor": "Intel(R) Xeon(R)", "cores": 1}
    _gaps(tmp_path, 0.1, 0.0, **digits)
    run_files.write_run(tmp_path, 0, 0, [0.4, 0.5])
    page = report.write_report(tmp_path).read_text()
    assert "20 runs on digits 1.7 (a test&#x27;s copy)." in page
    assert "the mean of the last 5 evaluations of 3,120 steps" in page
    assert "Training took 50 to 50 seconds a run (jax; " in page
    assert "(jax; CPU:0, Intel(R) Xeon(R), 1 core)." in page
    assert (
        "KERAS_BACKEND=jax python -m experiments.reproduce "
        "--preset=input_and_order --conditions=0,9 --seeds=5 "
        "--dataset=digits --output=RESULTS<"
    ) in page
    made = page[page.index("What made the control experiments</h2>") :]
    assert '<th scope="row">input</th><td>not the same in all<' in made
    assert '<th scope="row">layer</th><td>keras_bn<' in made
    assert '<th scope="row">data</th><td>digits 1.7 (a test' in made


def test_runs_that_have_just_begun_are_passed_over(tmp_path):
    arm = controls.folder(tmp_path, _CONTROL, _arm("raw_fixed"))
    run_files.write_run(arm, 0, 0, [0.5], steps=400)
    with pytest.raises(ExperimentError, match="has a finished run yet"):
        report.write_report(tmp_path)
    whole = tmp_path / "whole"
    _gaps(whole, 0.1, 0.0)
    # The folder of a lock, and a run without an evaluation.
    other = controls.folder(whole, _CONTROL, _arm("raw_reshuffled"))
    (other / "0/0").mkdir(parents=True)
    run_files.write_run(whole, 0, 0, [])
    page = report.write_report(whole).read_text()
    assert "+10.0 points" in page


def test_every_arm_is_a_setting_that_can_be_run():
    for control in controls.CONTROLS.values():
        names = {arm.name: arm for arm in control.arms}
        assert len(names) == len(control.arms)
        for arm in control.arms:
            for number in control.conditions:
                Settings(number, **arm.changes)
        for claim in control.claims:
            for name, number in (*claim.ours, *claim.others):
                assert names[name].differs_in(number)
                assert number in control.conditions
    fields = {x.name for x in dataclasses.fields(Settings)}
    assert {"placement", "input", "shuffle", "layer"} <= fields


def test_the_report_has_a_chapter_for_it(tmp_path):
    _gaps(tmp_path, 0.1, 0.0)
    page = report.write_report(tmp_path).read_text()
    assert "Control: How much of the gap" in page
    assert "+10.0 points" in page
    # Each seed tells its value when hovered over.
    titles = re.findall("<circle[^>]*><title>(.*?)</title>", page)
    assert len(titles) == 20
    assert "9, raw pixels, fixed order (article), seed 1: 0.5960" in titles
    assert (tmp_path / "figures/control_input_and_order.svg").exists()
    # Beside the article's own runs it is one chapter more.
    run_files.write_run(tmp_path, 0, 0, [0.4, 0.5])
    page = report.write_report(tmp_path).read_text()
    assert "Control: How much of the gap" in page
    assert "Final test accuracy" in page


def test_the_report_begins_with_what_was_measured(tmp_path):
    _gaps(tmp_path, 0.1, 0.0)
    page = report.write_report(tmp_path).read_text()
    short, _, rest = page.partition("The controls in short</h2>")[2].partition(
        "<h2"
    )
    listed = re.findall("<li>(.*?)</li>", short)
    # Of the arms that there are, and no "not measured yet".
    assert [x.split(": ")[0] for x in listed] == [
        f"{_GAP}raw pixels in fixed order"
    ]
    assert listed[0] in rest

"""The chapters of the report on the control experiments."""

import numpy as np

from experiments import control_results
from experiments import report_figures
from experiments import report_plots
from experiments import report_summaries
from experiments.report_html import items
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_regeneration import regenerate_control


def summary(found: list[control_results.Results]) -> str:
    """The verdicts that the report begins with; nothing if there are none."""
    said = [
        words
        for results in found
        for claim, words in zip(
            results.control.claims, results.verdicts(), strict=True
        )
        if claim.in_short and results.difference(claim) is not None
    ]
    if not said:
        return ""
    return section("The controls in short", items(said))


def chapters(
    found: list[control_results.Results],
) -> tuple[str, dict[str, str]]:
    """A chapter for each control experiment, and name -> SVG of its figure."""
    parts, files = [], {}
    note = _note_on_intervals(found)
    for results in found:
        control = results.control
        groups = [
            (
                f"{number}, {_words(control, arm, number)}",
                results.accuracies[arm.name, number],
            )
            for number in control.conditions
            for arm in control.arms
            if (arm.name, number) in results.accuracies
        ]
        runs = [run for own in results.runs.values() for run in own]
        name = f"control_{control.name}"
        svg = report_plots.draw_dots(name, groups)
        files[name] = svg
        words = "; ".join(
            f"{label}: {np.mean(list(of_seeds.values())):.3f}"
            for label, of_seeds in groups
        )
        caption = _caption(runs)
        parts.append(
            section(
                f"Control: {control.question}",
                items(results.verdicts()),
                "" if parts else note,
                report_figures.figure(
                    f"the control of {control.name.replace('_', ' ')}",
                    svg,
                    caption,
                    f"{caption} {words}.",
                ),
                regenerate_control(results),
            )
        )
    return "\n".join(parts), files


def _note_on_intervals(found) -> str:
    count = sum(
        difference is not None and difference.low is not None
        for results in found
        for claim in results.control.claims
        for difference in (
            results.difference(claim),
            results.recalibrated_difference(claim),
        )
    )
    if not count:
        return ""
    return paragraphs(
        [
            "Intervals are of differences of the same seed, by Student's t, "
            f"each of 95% by itself. Of the {count} of all controls some would "
            "exclude 0 by chance alone, and those that have the article's "
            "settings in them share its runs. Where one includes 0, what it "
            "reaches to is not excluded."
        ]
    )


def _words(control, arm, number):
    # One bar may be for all arms.
    if not any(x.differs_in(number) for x in control.own_arms):
        return "no batch normalization"
    return arm.words


def _caption(runs) -> str:
    facts = runs[0].facts
    counts = [len(run.accuracies) for run in runs]
    last = min(control_results.LAST_EVALUATIONS, *counts)
    said = (
        f"{len(runs)} runs on {report_summaries.data_of(facts)}. Each dot is a "
        "seed, the bar their mean, where the sentences above take the seeds "
        "alone that have all of their runs: test accuracy, the mean of the "
        f"last {last} evaluations of {facts['steps']:,} steps."
    )
    seconds = [r.train_seconds for r in runs if r.train_seconds is not None]
    if seconds:
        said += (
            f" Training took {min(seconds):,.0f} to {max(seconds):,.0f} "
            f"seconds a run ({facts.get('backend', 'backend not recorded')}; "
            f"{'; '.join(dict.fromkeys(x.hardware for x in runs))})."
        )
    return said

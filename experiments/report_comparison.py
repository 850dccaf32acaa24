"""The chapters of the report that compare: with the article, and by control.
"""

import numpy as np

from experiments import article
from experiments import comparison
from experiments import controls
from experiments import report_figures
from experiments import report_plots
from experiments.comparison import AtStep
from experiments.report_html import items
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_html import table
from experiments.report_summaries import Contents


def chapters(contents: Contents) -> str:
    """The chapters beside the article's figures, each if there is reason."""
    parts = [_recalibrated(contents), _stability(contents)]
    if contents.compared:
        parts = [_published(contents), _rank_order(contents), *parts]
    return "\n".join(part for part in parts if part)


def _published(contents) -> str:
    found = [
        one
        for summary in contents.summaries.values()
        for one in comparison.at_published_steps(summary)
    ]
    if not found:
        return ""
    rows = [
        [
            f"{one.number} at {one.step:,}",
            f"{one.published:.3f}",
            f"{one.published_deviation:.3f}",
            f"{one.mean:.3f}",
            f"{one.deviation:.3f}",
            f"{one.difference:+.3f}",
            "no, flagged" if one.flagged else "yes",
            one.seeds,
            f"{one.points}{'' if one.complete else ', not to the end'}",
        ]
        for one in found
    ]
    return section(
        "At the article's steps",
        paragraphs([_share_within(found)]),
        table(
            f"On {contents.data}. "
            "Condition and step. The article's value is the mean of 11 points "
            "of one run, its deviation theirs; ours the mean of the "
            "evaluations within the steps that those points span, its "
            "deviation that over the seeds (of one seed, over its "
            "evaluations). Within: the difference is at most twice the root "
            "of the sum of both squared deviations.",
            (
                "condition",
                "article",
                "deviation",
                "ours",
                "deviation",
                "difference",
                "within",
                "seeds",
                "evaluations",
            ),
            rows,
        ),
        items(_explanation(one) for one in found if one.flagged),
    )


def _share_within(found: list[AtStep]) -> str:
    within = sum(not one.flagged for one in found)
    largest = max(found, key=lambda one: abs(one.difference))
    return (
        f"{within} of {len(found)} values lie within the spread. The largest "
        f"difference is {largest.difference:+.3f}, condition {largest.number} "
        f"at {largest.step:,} steps."
    )


def _explanation(one: AtStep) -> str:
    seeds = "one seed" if one.seeds == 1 else f"{one.seeds} seeds"
    return (
        f"Condition {one.number} at {one.step:,}: {one.difference:+.3f}. What "
        "differs: the article's is a single run, of images that were not "
        "re-encoded as JPEG, in an order that it does not give; ours are "
        f"{seeds}. Which of them it is these runs cannot tell."
    )


def _rank_order(contents) -> str:
    steps = {
        one.step
        for summary in contents.summaries.values()
        for one in comparison.at_published_steps(summary)
    }
    rows = []
    for step in sorted(steps):
        first, last = article.PUBLISHED_SPANS[step]
        ours, published, without, with_it = [], [], [], []
        for number, summary in contents.summaries.items():
            within = (summary.steps >= first) & (summary.steps <= last)
            if not within.any() or summary.steps[-1] < step:
                continue
            means = summary.accuracies[:, within].mean(axis=1)
            ours.append(means)
            published.append(article.PUBLISHED[number].at_step[step])
            bare = summary.condition.batch_norm == "none"
            (without if bare else with_it).append(means.mean())
        if len(ours) < 3:
            continue
        rank = comparison.rank_order(ours, published)
        between = comparison.taus_between_seeds(ours)
        rows.append(
            [
                f"{step:,}",
                rank.conditions,
                f"{rank.tau:.2f}",
                "–"
                if rank.low is None
                else f"{rank.low:.2f} to {rank.high:.2f}",
                f"{np.mean(between):.2f}" if between else "–",
                "–"
                if not (without and with_it)
                else "yes"
                if max(without) < min(with_it)
                else "no",
            ]
        )
    if not rows:
        return ""
    return section(
        "Rank order of the conditions",
        table(
            f"On {contents.data}. "
            "Kendall's tau of our order against the published one, by the "
            "means at the same steps as above: 1 is the same order, 0 none. "
            "Its interval is a 95% bootstrap over seeds. Beside it the mean "
            "tau between two of our own seeds. The article's order at 5,000 "
            "steps against its order at the end has 0.79. Last: whether all "
            "conditions without batch normalization rank below all with it.",
            (
                "step",
                "conditions",
                "tau",
                "interval",
                "between our seeds",
                "none below all others",
            ),
            rows,
        ),
    )


def _recalibrated(contents) -> str:
    rows = []
    for number, summary in contents.summaries.items():
        pairs = [
            (float(run.accuracies[-1]), run.recalibrated)
            for run in summary.runs
            if run.recalibrated is not None
        ]
        if pairs:
            moving, recalibrated = np.mean(pairs, axis=0)
            rows.append(
                [
                    number,
                    f"{moving:.4f}",
                    f"{recalibrated:.4f}",
                    f"{recalibrated - moving:+.4f}",
                    len(pairs),
                ]
            )
    if not rows:
        return ""
    return section(
        "With moving and with recalibrated statistics",
        table(
            f"On {contents.data}. "
            "Test accuracy of the trained weights with the moving statistics "
            "that training left, and with those that keras_bn.recalibrate "
            "takes from the first training images: what the moving average "
            "costs. Means over the seeds.",
            ("ID", "moving", "recalibrated", "difference", "seeds"),
            rows,
        ),
    )


def _stability(contents) -> str:
    rows = []
    for number, summary in contents.summaries.items():
        found = comparison.stability(summary)
        if found is not None:
            rows.append(
                [
                    number,
                    f"{found.deviation:.4f}",
                    f"{found.collapses:g}",
                    found.evaluations,
                    len(summary.runs),
                ]
            )
    if not rows:
        return ""
    return section(
        "Stability",
        table(
            f"On {contents.data}. "
            "How much test accuracy jumps about in the second half of a run. "
            "Deviation: root mean square of what an evaluation is off the "
            "mean of the 11 around it. Collapses: evaluations of a seed that "
            f"lie {comparison.COLLAPSE:g} or more below the median of those.",
            ("ID", "deviation", "collapses", "evaluations", "seeds"),
            rows,
        ),
    )


def control_chapters(
    found: list[controls.Results],
) -> tuple[str, dict[str, str]]:
    """A chapter for each control experiment, and name -> SVG of its figure."""
    parts, files = [], {}
    for results in found:
        control = results.control
        groups = [
            (
                f"{number}, {arm.words}",
                results.accuracies[arm.name, number],
            )
            for number in control.conditions
            for arm in control.arms
            if (arm.name, number) in results.accuracies
        ]
        runs = [run for own in results.runs.values() for run in own]
        steps = runs[0].facts["steps"]
        name = f"control_{control.name}"
        svg = report_plots.draw_dots(name, groups)
        files[name] = svg
        words = "; ".join(
            f"{label}: {np.mean(list(of_seeds.values())):.3f}"
            for label, of_seeds in groups
        )
        caption = (
            "Each dot is a seed, the bar their mean: test accuracy, the mean "
            f"of the last {controls.LAST_EVALUATIONS} evaluations of "
            f"{steps:,} steps."
        )
        figure = report_figures.figure(svg, caption, f"{caption} {words}.")
        command = (
            "<pre>python -m experiments.reproduce "
            f"--preset={control.name} --seeds=5</pre>"
        )
        parts.append(
            section(
                f"Control: {control.question}",
                items(results.verdicts()),
                figure,
                command,
            )
        )
    return "\n".join(parts), files

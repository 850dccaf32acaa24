"""The chapters of the report on moving statistics and how accuracy jumps."""

import numpy as np

from experiments import article
from experiments import comparison
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_html import table
from experiments.report_summaries import Contents


def chapters(contents: Contents) -> str:
    """Recalibrated statistics, and stability, each if there is reason."""
    parts = _recalibrated(contents), _stability(contents)
    return "\n".join(part for part in parts if part)


def _recalibrated(contents) -> str:
    rows = []
    for number, summary in contents.summaries.items():
        if pairs := summary.moving_and_recalibrated():
            moving, recalibrated = np.mean(pairs, axis=0)
            rows.append(
                [
                    number,
                    f"{summary.steps[-1]:,}",
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
            f"Moving and recalibrated statistics on {contents.data}. "
            "Test accuracy of the trained weights with the moving statistics "
            "that training left, and with those that keras_bn.recalibrate "
            "takes from the first training images: what the moving average "
            "costs. Means over the seeds.",
            ("ID", "at step", "moving", "recalibrated", "difference", "seeds"),
            rows,
        ),
    )


def _stability(contents) -> str:
    rows, deviations = [], {}
    for number, summary in contents.summaries.items():
        found = comparison.stability(summary.accuracies)
        if found is None:
            continue
        deviations[number] = found.deviation
        row = [
            number,
            f"{summary.steps[-1]:,}",
            f"{found.deviation:.4f}",
            ", ".join(map(str, found.collapses)),
            found.evaluations,
            len(summary.runs),
        ]
        if contents.curves is not None:
            row += _published_stability(contents, number)
        rows.append(row)
    if not rows:
        return ""
    caption = (
        f"Stability on {contents.data}. "
        "How much test accuracy jumps about in the second half of a run. "
        "Deviation: root mean square of what an evaluation is off the "
        "mean of the 11 around it. Collapses: of each seed, how many "
        f"evaluations lie {comparison.COLLAPSE:g} or more below the median of "
        "those."
    )
    headings = ["ID", "to step", "deviation", "collapses", "evaluations"]
    headings += ["seeds"]
    if contents.curves is not None:
        caption += (
            " The article's: the same of its points up to the step at which "
            "ours end, which are unevenly spaced."
        )
        headings += [f"article's {x}" for x in headings[2:5]]
    return section(
        "Stability",
        _remark_on_stability(deviations) if contents.compared else "",
        table(caption, headings, rows),
    )


def _published_stability(contents, number):
    steps, accuracies = contents.curves.get(number, np.empty((0, 2))).T
    last = contents.summaries[number].steps[-1]
    found = comparison.stability(accuracies[None, steps <= last])
    if found is None:
        return ["–", "–", "–"]
    return [f"{found.deviation:.4f}", found.collapses[0], found.evaluations]


def _more(ours, others) -> str:
    # By the digits that are told.
    return "more" if round(ours, 3) > round(others, 3) else "not more"


def _remark_on_stability(deviations) -> str:
    """What our deviations say of the article's remark, if they can."""
    if not deviations.keys() >= set(range(len(article.CONDITIONS))):
        return ""

    def mean(fits):
        fitting = (x.number for x in article.CONDITIONS if fits(x))
        return np.mean([deviations[number] for number in fitting])

    dense = mean(lambda x: x.batch_norm == "dense")
    others = mean(lambda x: x.batch_norm in ("conv", "both"))
    bare, dropped = (
        mean(lambda x, rate=rate: x.dropout == rate and x.batch_norm != "dense")
        for rate in (0.0, 0.4)
    )
    said = (
        "The article remarks that models tend to be somewhat unstable without "
        "dropout, or with batch normalization in the dense layer alone. The "
        f"mean deviation here: in the dense layer alone {dense:.3f}, in the "
        f"convolutions or in all layers {others:.3f}; and with those of the "
        f"dense layer alone left out, without dropout {bare:.3f}, with dropout "
        f"0.4 {dropped:.3f}. So it is "
        f"{_more(dense, others)} in the dense layer alone, and "
        f"{_more(bare, dropped)} without dropout."
    )
    return paragraphs([said])

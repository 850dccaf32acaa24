"""The sections of the report's page, as HTML."""

from collections.abc import Sequence

from experiments import article
from experiments import control_results
from experiments import report_comparison
from experiments import report_controls
from experiments import report_figures
from experiments import report_stability
from experiments import report_studies
from experiments import report_summaries
from experiments.report_html import contents as table_of_contents
from experiments.report_html import escape
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_html import table
from experiments.report_regeneration import regenerate
from experiments.report_regeneration import settings_of
from experiments.report_summaries import Contents
from experiments.studies import study

# A published step this near to ours, relative to ours, is the same to us.
_MATCHING_STEPS = 0.05


def page_sections(
    contents: Contents | None,
    found: Sequence[control_results.Results],
    studied: Sequence[study.Results] = (),
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes out every section of the page.

    Args:
        contents: the runs of the article's experiment, if there are any.
        found: control experiments.
        studied: studies.

    Returns:
        Placeholder of the template -> HTML, and name of a figure -> SVG for
        a file of its own.
    """
    summary = report_studies.summary(studied)
    study_chapters, files = report_studies.chapters(studied)
    in_short = report_controls.summary(found)
    control_chapters, drawn = report_controls.chapters(found)
    files |= drawn
    runs = control_results.all_runs(found)
    of_controls = ""
    if runs:
        of_controls = settings_of(runs, "What made the control experiments")
    if contents is None:
        title = "Batch normalization: what is claimed of it, measured"
        said = f"{len(studied)} studies of small networks."
        chapters = [summary, study_chapters]
        if runs:
            title = "Batch normalization in the article's CNN: controls"
            said = f"{len(runs)} runs of control experiments."
            chapters += [in_short, control_chapters, of_controls]
        introduction = paragraphs([said])
    else:
        title = f"Batch normalization in the article's CNN on {contents.data}"
        introduction = _introduction(contents)
        limits = report_figures.shared_axes(list(contents.summaries.values()))
        figures, drawn = _figures(contents, limits)
        files |= drawn
        on_data = f"on {contents.data}"
        chapters = [
            in_short,
            summary,
            section(f"Final test accuracy {on_data}", _accuracies(contents)),
            section(
                f"Test accuracy over training steps {on_data}",
                _figure_notes(contents, limits),
                f'<div class="figures">\n{figures}\n</div>',
            ),
            report_comparison.chapters(contents),
            report_stability.chapters(contents),
            control_chapters,
            study_chapters,
            section(f"Runs {on_data}", _runs(contents)),
            settings_of(contents.runs),
            of_controls,
            section("How to make this report again", regenerate(contents)),
        ]
    text = "\n".join(x for x in chapters if x)
    return {
        "title": escape(title),
        "introduction": introduction,
        "contents": table_of_contents(text),
        "chapters": text,
    }, files


def _introduction(contents) -> str:
    runs = contents.runs
    finished = sum(run.finished for run in runs)
    sentences = [
        f"{len(runs)} runs of {len({r.condition for r in runs})} of the "
        f"article's {len(article.CONDITIONS)} conditions, {finished} of them "
        f"finished. The article is {article.REFERENCE}: a network of two "
        "convolutions and two dense layers. Its conditions, which have an ID "
        "from 0 to 11, are batch normalization nowhere (none), after both "
        "convolutions (conv), after the dense layer of 1,024 units (dense) or "
        "after all three (both), each with dropout of 0, 0.2 and 0.4. Test "
        "accuracy is the share of all test images classified rightly. In test "
        "batch normalization uses moving averages of its statistics; "
        "recalibrated is what is measured with statistics that are taken anew "
        "once training is over."
    ]
    if not contents.compared:
        sentences.append(
            f"These results were measured on {runs[0].facts['dataset']}, not "
            "on the article's CIFAR-10. They are not compared with the "
            "article, and its values are not shown."
        )
        return paragraphs(sentences)
    departures = report_comparison.departures(contents)
    longest = max(run.facts["steps"] for run in runs)
    if longest < article.STEPS:
        departures.append(f"{longest:,} steps (the article: {article.STEPS:,})")
    if departures:
        sentences.append(
            f"Set otherwise than in the article: {'; '.join(departures)}."
        )
    return paragraphs(sentences)


def _seeds(summary) -> str:
    text = str(len(summary.runs))
    if not summary.finished:
        return f"{text}, unfinished"
    others = [
        f"{len(runs)} more {words}"
        for runs, words in (
            (summary.unfinished, "unfinished"),
            (summary.shorter, "of fewer steps"),
        )
        if runs
    ]
    return f"{text} ({', '.join(others)})" if others else text


def _beside(mean, step, smoothed, published) -> list[str]:
    """The article's accuracy, and ours less it where like stands by like."""
    if published is None:
        return ["–", "–"]
    accuracy, published_step = published
    if abs(published_step - step) > _MATCHING_STEPS * step:
        return [f"{accuracy:.4f} at step {published_step:,}", "–"]
    # One evaluation is off by what the moving average happens to be.
    difference = f"{mean - accuracy:+.4f}" if smoothed else "–"
    return [f"{accuracy:.4f}", difference]


def _accuracies(contents) -> str:
    headings = ["ID", "batch norm", "dropout", "test accuracy", "spread"]
    smoothed = any(x.smoothed for x in contents.summaries.values())
    caption = (
        f"Measured on {contents.data}. ID: the article's number of the "
        "condition. Test accuracy: mean over the seeds, of the last "
        f"{article.SMOOTHING_POINTS} points of a run with at least "
        f"{report_summaries.LEAST_POINTS_TO_SMOOTH} points, else of its last "
        "point. Spread: standard deviation over the seeds (n - 1), none for "
        "one seed."
    )
    if contents.compared:
        headings += ["article"]
        caption += (
            " Article (one run of each condition): the mean of its 11 points "
            "around the one nearest to our step"
            if contents.curves is not None
            else " Article (one run of each condition): interpolated linearly "
            "at our step between the steps of its table, "
            f"{', '.join(f'{s:,}' for s in article.PUBLISHED_STEPS)} (means "
            "of 11 points, the last of 10)"
        )
        caption += (
            "; where that lies elsewhere its step is given, and no difference."
            if smoothed
            else ". Its difference from single evaluations is none to go by: "
            "at the article's steps, below, like is compared with like."
        )
        if smoothed:
            headings += ["difference"]
    headings += ["at step", "seeds"]
    rows = []
    for number, summary in contents.summaries.items():
        mean, spread = summary.final()
        step = int(summary.steps[-1])
        row = [
            number,
            summary.condition.batch_norm,
            summary.condition.dropout,
            f"{mean:.4f}",
            "–" if spread is None else f"{spread:.4f}",
        ]
        if contents.compared:
            beside = _beside(
                mean,
                step,
                summary.smoothed,
                report_summaries.published_at(number, step, contents.curves),
            )
            row += beside if smoothed else beside[:1]
        rows.append([*row, f"{step:,}", _seeds(summary)])
    return table(caption, headings, rows)


def _figure_notes(contents, limits) -> str:
    smoothed = [s.smoothed for s in contents.summaries.values()]
    points = article.SMOOTHING_POINTS
    least = report_summaries.LEAST_POINTS_TO_SMOOTH
    sentences = [
        "Lines are means over the seeds; bands reach one standard deviation "
        "to either side."
    ]
    if all(smoothed):
        sentences.append(f"Smoothed over {points} points, as in the article.")
    elif any(smoothed):
        sentences.append(
            f"Conditions with at least {least} points are smoothed over "
            f"{points}, as in the article; the others are drawn as measured."
        )
    else:
        sentences.append(
            f"With fewer than {least} points a run, nothing is smoothed."
        )
    if contents.curves is not None:
        sentences.append(
            "Thin: the article's own curves, one run each, smoothed where "
            "ours are."
        )
    elif contents.compared:
        sentences.append(
            "Open marks: the article's values, one run each, means of 11 "
            "points, the first of which lie far apart and before the mark "
            "(from 540 to 2,590 steps for 2,000): the table below compares "
            "like with like. Those beyond the step axis are not shown."
        )
        if article.PUBLISHED_STEPS[0] > limits.last_step:
            sentences.append(
                f"All are: the first stands at {article.PUBLISHED_STEPS[0]:,} "
                "steps."
            )
    left_out = [
        f"{count}, {article.FIGURE_TITLES[name]} "
        f"({', '.join(map(str, numbers))})"
        for count, (name, numbers) in enumerate(article.FIGURES.items(), 1)
        if not any(number in contents.summaries for number in numbers)
    ]
    if left_out:
        sentences.append(
            "Not drawn, for there are no results yet of its conditions: "
            f"figure {'; '.join(left_out)}."
        )
    return paragraphs([" ".join(sentences)])


def _figures(contents, limits) -> tuple[str, dict[str, str]]:
    """Returns the figures as HTML, and each as an SVG file's content."""
    blocks, files = [], {}
    for count, (name, numbers) in enumerate(article.FIGURES.items(), 1):
        chosen = [contents.summaries.get(number) for number in numbers]
        drawn = [summary for summary in chosen if summary]
        if not drawn:
            continue
        listed = ", ".join(map(str, numbers))
        named = f"Figure {count}, {article.FIGURE_TITLES[name]}"
        title = f"{named}: conditions {listed} on {contents.data}."
        missing = [str(n) for n in numbers if n not in contents.summaries]
        svg, outside = report_figures.draw(
            name,
            chosen,
            limits,
            contents.compared,
            contents.curves,
        )
        files[name] = svg
        ends = "; ".join(
            f"condition {report_figures.label(s.condition)}, ends at "
            f"{s.final()[0]:.3f}, step {s.steps[-1]:,}"
            for s in drawn
        )
        description = f"{title} Test accuracy over training steps. {ends}."
        notes = [title]
        if missing:
            notes.append(f"No results yet: {', '.join(missing)}.")
        if outside:
            notes.append(outside)
        caption = f"<strong>{escape(notes[0])}</strong> " + escape(
            " ".join(notes[1:])
        )
        blocks.append(report_figures.framed(named, svg, description, caption))
    return "\n".join(blocks), files


def _runs(contents) -> str:
    rows = []
    for run in contents.runs:
        seconds, speed = run.train_seconds, run.images_per_second
        rows.append(
            [
                run.condition.number,
                run.seed,
                f"{run.accuracies[-1]:.4f}" if len(run.accuracies) else "–",
                f"{run.last_step:,}",
                "finished"
                if run.finished
                else f"unfinished, of {run.facts['steps']:,}",
                "–" if seconds is None else f"{seconds:,.0f}",
                "–" if run.eval_seconds is None else f"{run.eval_seconds:,.0f}",
                "–" if speed is None else f"{speed:,.0f}",
                run.hardware,
            ]
        )
    return table(
        f"Every run on {contents.data}. Training time leaves out evaluation, "
        "which by default is rarer than the article's, every 50 steps; images "
        "per second is the median over the stretches between evaluations.",
        (
            "ID",
            "seed",
            "last test accuracy",
            "at step",
            "state",
            "training, seconds",
            "evaluation, seconds",
            "images per second",
            "hardware",
        ),
        rows,
    )

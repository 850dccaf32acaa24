"""The report's figures, as SVG."""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import article
from experiments.report_html import escape
from experiments.report_summaries import Summary
from experiments.report_summaries import smooth

# The article's step axis is kept once a run fills most of it.
_LEAST_FILL_OF_STEP_AXIS = 2 / 3
# As many points of a curve as tell their values: to hover over, not to read.
_MOST_MARKS = 150
# The article's accuracy axis is kept while this much of the curves is on it.
_LEAST_SHARE_IN_VIEW = 0.9

# Stand-ins that become CSS variables in the page, so that the figures follow
# its light or dark scheme. As they stand they suit a white background, and
# colour-blind readers: blue, vermilion and green after Okabe and Ito.
INK, GRID = "#24292f", "#d4d9df"
SERIES = ("#0072b2", "#c1500a", "#00795a")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.3)))
# The article's points have the colour of our line, and a shape of their own.
_PUBLISHED_MARKERS = ("D", "s", "^")
_VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    **{c: f"var(--series-{n})" for n, c in enumerate(SERIES, start=1)},
}


def style(name: str) -> dict:
    """Returns the settings of Matplotlib for a figure of a name.

    The same figure is then the same SVG, and its text is text.
    """
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }


def label(condition: article.Condition) -> str:
    """Names a condition, as in `10: batch norm both, dropout 0.2`."""
    return (
        f"{condition.number}: batch norm {condition.batch_norm}, "
        f"dropout {condition.dropout}"
    )


class Axes(NamedTuple):
    """Right end of the step axis, and both ends of the accuracy axis."""

    last_step: float
    low: float
    high: float


def shared_axes(summaries: Sequence[Summary]) -> Axes:
    """Chooses the axes of all figures of a report, so that they compare.

    They are the article's where the longest run comes near its step axis
    and nearly all points lie within its accuracies. Short runs get a step
    axis of their own length, and every point is in view.

    Args:
        summaries: of all conditions, at least one.

    Returns:
        The `Axes`.
    """
    last_step = article.STEP_AXIS[1]
    low, high = article.ACCURACY_AXIS
    longest = max(int(summary.steps[-1]) for summary in summaries)
    values = np.concatenate([summary.curve()[1] for summary in summaries])
    inside = np.mean((values >= low) & (values <= high))
    if longest < _LEAST_FILL_OF_STEP_AXIS * last_step:
        last_step = 1.02 * longest  # keeps the last marker whole
    elif inside >= _LEAST_SHARE_IN_VIEW:
        return Axes(last_step, low, high)
    lowest = np.floor(20 * values.min() - 0.5) / 20
    highest = np.ceil(20 * values.max() + 0.5) / 20
    return Axes(
        last_step, max(0.0, min(low, lowest)), max(high, min(1.01, highest))
    )


def draw(
    name: str,
    summaries: Sequence[Summary | None],
    limits: Axes,
    published: bool,
    curves: dict[int, np.ndarray] | None,
) -> tuple[str, str]:
    """Draws test accuracy over training steps for some conditions.

    Args:
        name: of the figure; makes the ids inside the SVG its own.
        summaries: of the conditions drawn, at most three; None keeps the
            colour of a condition that has no results yet.
        limits: from `shared_axes`.
        published: whether the article's values are drawn behind.
        curves: the article's curves, or None for its table's points.

    Returns:
        The SVG for a white background, and a sentence that says which
        points lie outside the axes, empty if none does.
    """
    # Matplotlib takes longer to import than all that a user's mistake needs.
    import matplotlib
    from matplotlib.figure import Figure

    looks = [
        (summary, summary.curve(), color, dashes)
        for summary, color, dashes in zip(summaries, SERIES, DASHES)
        if summary is not None
    ]
    with matplotlib.rc_context(style(name)):
        figure = Figure(figsize=(4.8, 3.9), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        article_in_view, marks = False, []
        for summary, _, color, dashes in looks if published else ():
            number = summary.condition.number
            look = {"color": color, "zorder": 1, "linestyle": dashes}
            look |= {"linewidth": 0.6}
            if curves is None:
                marker = _PUBLISHED_MARKERS[SERIES.index(color)]
                look |= {"linestyle": "none", "marker": marker}
                look |= {"markersize": 4, "markerfacecolor": "none"}
            points = _published_points(summary, curves)
            axes.plot(*points.T, **look)
            article_in_view |= bool((points[:, 0] <= limits.last_step).any())
            around = "" if curves else "around "
            marks += _marks(
                f"condition {number}, the article, {around}", points, limits
            )
        for summary, (steps, mean, spread), color, dashes in looks:
            seeds = len(summary.runs)
            text = f"{label(summary.condition)}; {seeds} seed"
            text += "s" * (seeds > 1)
            if not summary.finished:
                text += f", so far step {summary.steps[-1]:,}"
            axes.plot(
                steps,
                mean,
                color=color,
                linestyle=dashes,
                linewidth=1.6,
                marker="o" if len(steps) <= 20 else None,
                markersize=3.5,
                label=text,
                zorder=3,
            )
            if seeds > 1:
                axes.fill_between(
                    steps,
                    mean - spread,
                    mean + spread,
                    color=color,
                    alpha=0.18,
                    linewidth=0,
                    zorder=2,
                )
        if article_in_view:
            axes.plot(
                [],
                [],
                color=INK,
                linewidth=0.6 if curves else 0,
                marker=None if curves else "D",
                markersize=4,
                markerfacecolor="none",
                label="the article, in the same colours and "
                + ("dashes, thin" if curves else "open marks"),
            )
        axes.set_xlim(0, limits.last_step)
        axes.set_ylim(limits.low, limits.high)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(5, integer=True)
        )
        axes.set_xlabel("training steps")
        axes.set_ylabel("test accuracy")
        figure.legend(loc="outside lower left", frameon=False, handlelength=3)
        # Ours come last: of marks one above the other it is they that answer.
        for summary, (steps, mean, spread), _, _ in looks:
            points = np.stack([steps, mean, spread], axis=1)
            marks += _marks(
                f"condition {summary.condition.number}, ",
                points[:, : 3 if len(summary.runs) > 1 else 2],
                limits,
            )
        return to_svg(figure, axes, marks), _outside(looks, limits)


def figure(name: str, svg: str, caption: str, description: str) -> str:
    """A figure of the page: what it shows, and what is said of it.

    Args:
        name: what it is called, in words.
        svg: from one of the functions that draw.
        caption: below it.
        description: what a reader who cannot see it is told.
    """
    return framed(name, svg, description, escape(caption))


def framed(name: str, svg: str, description: str, caption: str) -> str:
    """The same, with a caption that is HTML.

    What the pointer finds by hovering is listed too, for a finger, a keyboard
    and a screen reader.
    """
    values = re.findall("<circle[^>]*><title>(.*?)</title>", svg)
    listed = "\n".join(f"<li>{words}</li>" for words in values)
    return (
        f"<figure>{inline(svg, escape(description))}"
        f"<figcaption>{caption}</figcaption>"
        f"<details><summary>{len(values)} values of {escape(name)}</summary>"
        f"<ul>\n{listed}\n</ul></details></figure>"
    )


def _marks(whose, points, limits):
    """Points that tell their values: `(step, accuracy, words)`.

    Args:
        whose: what their words begin with.
        points: a row each of step, accuracy and, if there is one, deviation.
        limits: the `Axes`.
    """
    points = points[points[:, 0] <= limits.last_step]
    stride = -(-len(points) // _MOST_MARKS) or 1
    for step, value, *deviation in points[::stride]:
        if limits.low <= value <= limits.high:
            words = f"{whose}step {step:,.0f}: {value:.4f}"
            words += "".join(f", deviation {x:.4f}" for x in deviation)
            yield step, value, words


def to_svg(drawing, axes, marks):
    """The SVG of a figure, with what its points tell when hovered over."""
    buffer = io.StringIO()
    drawing.savefig(
        buffer,
        format="svg",
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    # A hundredth of a point is finer than any screen. Text stays as it is.
    svg = re.sub(
        r"<[^>]*>",
        lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()),
        buffer.getvalue(),
    )
    points_per_pixel = 72 / drawing.dpi
    height = 72 * drawing.get_figheight()
    circles = []
    for x, y, words in marks:
        across, up = axes.transData.transform((x, y)) * points_per_pixel
        circles.append(
            f'<circle cx="{across:.2f}" cy="{height - up:.2f}" r="5" '
            f'fill="transparent"><title>{escape(words)}</title></circle>\n'
        )
    return svg.replace("</svg>", f"{''.join(circles)}</svg>")


def inline(svg: str, description: str) -> str:
    """Makes an SVG part of a page: its colours variables, nothing to load.

    Args:
        svg: from `draw`.
        description: what a reader who cannot see it is told; HTML-escaped.

    Returns:
        An `svg` element without width and height, to be sized by the page.
    """
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening).group()
    for color, variable in _VARIABLES.items():
        rest = rest.replace(color, variable)
    # Groups are numbered alike in every figure; nothing refers to them.
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r"\n\s*", "\n", rest)
    return f'<svg {box} role="img" aria-label="{description}">{rest}'


def _published_points(summary, curves) -> np.ndarray:
    """The article's (step, accuracy) of a condition, smoothed where ours is."""
    number = summary.condition.number
    if curves is None:
        at_step = article.PUBLISHED[number].at_step
        return np.array(list(at_step.items()), float)
    if number not in curves:
        return np.empty((0, 2))
    if not summary.smoothed:
        return curves[number]
    return np.stack([smooth(column) for column in curves[number].T], axis=1)


def _outside(looks, limits) -> str:
    parts = []
    for summary, (steps, mean, _), _, _ in looks:
        hidden = (mean < limits.low) | (mean > limits.high)
        hidden &= steps <= limits.last_step
        if hidden.any():
            parts.append(
                f"condition {summary.condition.number}, {hidden.sum()} of "
                f"{len(steps)} points ({mean[hidden].min():.3f} to "
                f"{mean[hidden].max():.3f}, the last at step "
                f"{steps[hidden][-1]:,.0f})"
            )
    if not parts:
        return ""
    return (
        f"Out of view, below {limits.low:g} or above {limits.high:g}: "
        f"{'; '.join(parts)}."
    )

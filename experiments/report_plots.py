"""Figures of any values of some groups of runs, as SVG."""

import textwrap
from collections.abc import Sequence

import numpy as np

from experiments.report_figures import DASHES
from experiments.report_figures import GRID
from experiments.report_figures import SERIES
from experiments.report_figures import style
from experiments.report_figures import to_svg

_MARKERS = ("o", "s", "^")
# Inches, and letters of a label: of 360 pixels the text can still be read.
_WIDTH = 4.8
_ROW_LETTERS, _LEGEND_LETTERS = 30, 60


def draw_dots(
    name: str,
    groups: Sequence[tuple[str, dict[int, float]]],
    unit: str = "test accuracy",
) -> str:
    """Draws what some groups of runs came to, a row for each group.

    Args:
        name: of the figure.
        groups: what each is, and seed -> value.
        unit: what the values are.

    Returns:
        The SVG for a white background.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style(name)):
        labels = [textwrap.fill(words, _ROW_LETTERS) for words, _ in groups]
        lines = sum(1 + words.count("\n") for words in labels)
        height = 0.9 + 0.08 * len(groups) + 0.16 * lines
        drawing = Figure(figsize=(_WIDTH, height), layout="constrained")
        drawing.patch.set_visible(False)
        axes = drawing.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(color=GRID, linewidth=0.6, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        marks = []
        for row, (words, of_seeds) in enumerate(groups):
            values = list(of_seeds.values())
            axes.plot(
                values,
                [row] * len(values),
                color=SERIES[0],
                linewidth=0,
                marker="o",
                markersize=4,
                alpha=0.6,
            )
            mean = float(np.mean(values))
            axes.plot(
                [mean, mean],
                [row - 0.3, row + 0.3],
                color=SERIES[1],
                linewidth=2,
            )
            marks += [
                (value, row, f"{words}, seed {seed}: {value:.4f}")
                for seed, value in of_seeds.items()
            ]
        axes.set_yticks(range(len(groups)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel(unit)
        return to_svg(drawing, axes, marks)


def draw_lines(
    name: str,
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]],
    across: str,
    up: str,
    log: str = "",
) -> str:
    """Draws values of some groups of runs over a scale.

    Args:
        name: of the figure.
        lines: what each is, its places on the scale, and the values there,
            shaped (seeds, places); they are drawn as their mean, and a band
            of a standard deviation to either side.
        across, up: what the axes are.
        log: which axes are logarithmic: "x", "y", "xy" or none.

    Returns:
        The SVG for a white background.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style(name)):
        labels = [textwrap.fill(x, _LEGEND_LETTERS) for x, _, _ in lines]
        rows = sum(1 + words.count("\n") for words in labels)
        size = (_WIDTH, 3.1 + 0.2 * rows)
        drawing = Figure(figsize=size, layout="constrained")
        drawing.patch.set_visible(False)
        axes = drawing.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        marks = []
        for number, (words, places, values) in enumerate(lines):
            turn, color = divmod(number, len(SERIES))
            # Not by colour alone: dashes and marks differ as well.
            look = (turn + color) % len(DASHES)
            mean = values.mean(axis=0)
            axes.plot(
                places,
                mean,
                color=SERIES[color],
                linestyle=DASHES[look],
                linewidth=1.6,
                marker=_MARKERS[look],
                markersize=3.5,
                label=labels[number],
            )
            spread = np.zeros_like(mean)
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(
                    places,
                    mean - spread,
                    mean + spread,
                    color=SERIES[color],
                    alpha=0.15,
                    linewidth=0,
                )
            marks += [
                (x, y, f"{words}, {x:g}: {y:.4g}, deviation {off:.2g}")
                for x, y, off in zip(places, mean, spread)
                if np.isfinite(y)
            ]
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        drawing.legend(loc="outside lower left", frameon=False, handlelength=3)
        return to_svg(drawing, axes, marks)

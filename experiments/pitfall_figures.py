"""The figures of `experiments.update_ops_pitfall`, as SVG and PNG."""

from collections.abc import Sequence
from pathlib import Path

from experiments import ExperimentError
from experiments.report_figures import GRID
from experiments.report_figures import INK
from experiments.report_figures import SERIES
from experiments.report_figures import style

_WRONG, _RIGHT = SERIES[1], SERIES[0]


def draw_headline(curve: Sequence[dict], note: str, folder: Path) -> list[Path]:
    """Draws test accuracy over steps with both kinds of statistics.

    Args:
        curve: objects with `step`, `test_accuracy` and
            `test_accuracy_recalibrated`.
        note: what it was measured on.
        folder: where `headline.svg` and `headline.png` are written.

    Returns:
        The files.

    Raises:
        ExperimentError: they cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(style("headline")):
        figure, axes = _figure(5.6, 3.6)
        steps = [line["step"] for line in curve]
        for name, words, color, dashes in (
            (
                "test_accuracy_recalibrated",
                "statistics recalibrated",
                _RIGHT,
                "-",
            ),
            ("test_accuracy", "moving statistics", _WRONG, (0, (6, 2))),
        ):
            axes.plot(
                steps,
                [line[name] for line in curve],
                color=color,
                linestyle=dashes,
                linewidth=1.6,
                marker="o" if len(steps) <= 20 else None,
                markersize=3.5,
                label=words,
            )
        axes.set_xlim(0, 1.02 * steps[-1])
        axes.xaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(6, integer=True)
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("training steps")
        axes.set_ylabel("test accuracy")
        axes.set_title(f"The same weights, condition 9, {note}", fontsize=9)
        figure.legend(
            loc="outside lower left", ncols=2, frameon=False, handlelength=3
        )
        return _save(figure, folder / "headline")


def draw_forms(
    lines: Sequence[dict], steps: int, note: str, folder: Path
) -> list[Path]:
    """Draws the test accuracy of every arm, before and after `recalibrate`.

    Args:
        lines: those of results.jsonl.
        steps: of all trainings but the one of few steps.
        note: what they were measured on.
        folder: where `forms.svg` and `forms.png` are written.

    Returns:
        The files.

    Raises:
        ExperimentError: they cannot be written.
    """
    import matplotlib
    from matplotlib.patches import Patch

    with matplotlib.rc_context(style("forms")):
        figure, axes = _figure(7.2, 1.1 + 0.42 * len(lines))
        height, places, place, form = 0.38, [], 0.0, None
        for line in lines:
            # A gap between forms.
            place += 1.0 + (0.4 if form not in (None, line["form"]) else 0.0)
            form = line["form"]
            places.append(place)
            color = _RIGHT if line["right"] else _WRONG
            for offset, name, look in (
                (-height / 2, "test_accuracy", {"color": color}),
                (
                    height / 2,
                    "test_accuracy_recalibrated",
                    {
                        "facecolor": "none",
                        "edgecolor": color,
                        "hatch": "////",
                    },
                ),
            ):
                value = line[name]
                axes.barh(place + offset, value, height, **look)
                words = f"{value:.3f}"
                if line["refusal"] and name != "test_accuracy":
                    words += " (refused, forced here)"
                axes.text(
                    value + 0.008, place + offset, words, va="center", size=7
                )
        axes.set_yticks(
            places, [f"{line['form']}: {line['title']}" for line in lines]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("test accuracy")
        axes.set_title(f"{steps:,} steps of condition 9, {note}", fontsize=9)
        figure.legend(
            handles=[
                Patch(color=_WRONG, label="wrong"),
                Patch(color=_RIGHT, label="right"),
                Patch(
                    facecolor="none",
                    edgecolor=INK,
                    hatch="////",
                    label="the same, recalibrated",
                ),
            ],
            loc="outside lower left",
            ncols=3,
            frameon=False,
        )
        return _save(figure, folder / "forms")


def _figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path):
    paths = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    try:
        figure.savefig(
            paths[0],
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    except OSError as error:
        raise ExperimentError(
            f"cannot write {path}.svg and .png: {error.strerror}; make room, "
            "or give another output"
        ) from error
    return paths

"""Draws the article's figures and tables from result files; never trains.

    python -m experiments.report --results=results

Writes `report.html`, a page that needs nothing else to be read, and its
figures as `figures/*.svg`, all in the folder of results.
"""

import os
import string
from pathlib import Path

from absl import flags

from experiments import ExperimentError
from experiments import atomic
from experiments import control_results
from experiments import controls
from experiments import launch
from experiments import report_sections
from experiments import report_studies
from experiments import report_summaries
from experiments import result_files

_TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(
    results_dir: Path | str, published_curves: Path | str | None = None
) -> Path:
    """Writes the report of all results in a folder.

    Args:
        results_dir: folder with `<condition>/<seed>/run.json` and so on, as
            `experiments.train` writes them, or with control experiments, or
            with studies, or several of these. Runs may be unfinished.
        published_curves: CSV file of the article's own curves, with the
            columns condition, step and test_accuracy; without it the values
            of the article's table are drawn. Neither is for results on
            other data than CIFAR-10.

    Returns:
        Path of `report.html`, in that folder.

    Raises:
        ExperimentError: there is nothing to report, a file is damaged, the
            runs were made with different settings, or the report cannot be
            written. What an earlier call wrote stays then.
    """
    results_dir = Path(results_dir)
    found = control_results.read(results_dir)
    studied = report_studies.read(results_dir)
    contents = None
    others = bool(found or studied)
    begun = result_files.has_files(results_dir, "*/*/run.json")
    if not (others or begun) and control_results.begun(results_dir):
        raise ExperimentError(
            f"no control experiment in {results_dir} has a finished run yet "
            "beside those of the article's settings; come back when one has"
        )
    if not (others or begun) and os.path.isdir(results_dir):
        raise ExperimentError(_nothing(results_dir))
    if begun or not others:
        try:
            contents = report_summaries.read_contents(
                results_dir, published_curves
            )
        except report_summaries.NothingEvaluatedError:
            if not others:
                raise
    if contents is None and published_curves is not None:
        # Nothing to draw them in, but a wrong file is said.
        report_summaries.read_published_curves(published_curves)
    path = results_dir / "report.html"
    atomic.check_writable(path)
    sections, figures = report_sections.page_sections(
        contents, found, studied
    )
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.substitute(sections)
    # All is drawn before the first file is touched, and the page comes last.
    for name, svg in figures.items():
        atomic.write_text(results_dir / "figures" / f"{name}.svg", svg)
    atomic.write_text(path, page)
    return path


# What a folder of results may have in it.
_RESULTS = (
    "[0-9]*/[0-9]*/run.json",
    report_studies.FILES,
    f"{controls.FOLDER}/*/**/run.json",
)


def _nothing(results_dir):
    """Says what to do where there are no results, but perhaps nearby."""
    for folder in (*sorted(results_dir.iterdir()), *results_dir.parents):
        # Of a folder above, what was given must be a part.
        part = results_dir if folder in results_dir.parents else folder
        if any(
            found.is_relative_to(part)
            for pattern in _RESULTS
            if result_files.has_files(folder, pattern)
            for found in folder.glob(pattern)
        ):
            return (
                f"{results_dir} is no folder of results, but {folder} is: "
                f"give --results={folder}"
            )
    return (
        f"no results in {results_dir}: train a condition (python -m "
        "experiments.train) or run a study (python -m experiments.studies) "
        "first, or give another folder"
    )


def main(argv: list[str]) -> None:
    del argv
    path = write_report(
        flags.FLAGS.results, flags.FLAGS.published_curves or None
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    flags.DEFINE_string("results", "results", "Folder that training wrote.")
    flags.DEFINE_string(
        "published_curves",
        None,
        "CSV file of the article's curves: condition, step, test_accuracy.",
    )
    launch(main)

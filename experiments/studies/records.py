"""The result file of a study, `<results>/studies/<name>/runs.jsonl`.

A line for each finished run, a JSON object:

    facts     the content of its run.json
    lines     name of a value in metrics.jsonl or timing.jsonl -> its values
              at each evaluation, rounded to 5 digits; a value that is not a
              number is null
    measures  what the study measured of the trained network

Verdicts and figures are made of this file alone. Beside it each run has a
folder, `<arm>/<seed>/`, which is what it goes on from until it is finished.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import filelock
import numpy as np

from experiments import ExperimentError
from experiments import atomic
from experiments import result_files
from experiments.run_folder import RunFolder

FILE = "runs.jsonl"
# The share of a run's evaluations, the last ones, whose mean is its result:
# one alone is off by what the moving averages happen to be.
LAST = 0.25
_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        facts: the content of its run.json.
        lines: name -> float array, a value for each evaluation.
        measures: name -> number.
    """

    facts: dict
    lines: Mapping[str, np.ndarray]
    measures: Mapping[str, float]

    def last(self, name: str) -> float:
        """Mean of a value over the last quarter of the evaluations."""
        values = self.lines[name]
        return float(values[-max(1, round(LAST * len(values))) :].mean())


def add(
    folder: Path, run_folder: RunFolder, measures: Mapping[str, float]
) -> None:
    """Adds a finished run to the records of a study.

    Args:
        folder: of the study.
        run_folder: of the run.
        measures: of its trained network.

    Raises:
        ExperimentError: a file cannot be read or written.
    """
    facts = result_files.read_facts(run_folder.path / "run.json")
    timing = result_files.read_timing(run_folder.path, facts["steps"])
    add_lines(folder, facts, [*run_folder.metrics()], timing, measures)


def add_lines(
    folder: Path,
    facts: dict,
    metrics: list[dict],
    timing: list[dict],
    measures: Mapping[str, float],
) -> None:
    """Adds what a run came to; see the module."""
    columns = {}
    for rows in (metrics, timing):
        for name in rows[0] if rows else ():
            columns[name] = [_rounded(row[name]) for row in rows]
    record = {
        "facts": facts,
        "lines": columns,
        "measures": {x: _rounded(y) for x, y in measures.items()},
    }
    path = folder / FILE
    atomic.make_folder(folder)
    # Several processes may share the runs of a study.
    with filelock.FileLock(folder / "runs.lock"):
        lines = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
        lines.append(json.dumps(record, allow_nan=False))
        atomic.write_text(path, "".join(f"{line}\n" for line in lines))


def read(folder: Path) -> dict[str, dict[int, Record]]:
    """Reads the records of a study.

    Args:
        folder: of the study.

    Returns:
        Name of an arm -> seed -> `Record`; nothing if there is no file.

    Raises:
        ExperimentError: the file is damaged.
    """
    path = folder / FILE
    found = {}
    if not os.path.exists(path):
        return found
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}, line {number}"
        record = _record(where, line)
        own = found.setdefault(record.facts["arm"], {})
        own[record.facts["seed"]] = record
    return found


def _record(where, line):
    try:
        parsed = json.loads(line)
        record = Record(
            dict(parsed["facts"]),
            {
                name: np.array(values, float)
                for name, values in parsed["lines"].items()
            },
            {
                name: math.nan if value is None else float(value)
                for name, value in parsed["measures"].items()
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExperimentError(
            f"{where}: not a record of a run; restore the file, or delete "
            "it to have the study run anew"
        ) from error
    result_files.check_facts(where, record.facts)
    return record


def _rounded(value):
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")

"""Reads what training left behind: `<results>/<condition>/<seed>/`.

`run_folder` says what is in that folder.
"""

import dataclasses
import json
import os
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import ExperimentError
from experiments import article
from experiments import same_settings


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


# What a value in a file must be, in words and as a test.
_TEXT = ("text", lambda x: isinstance(x, str) and x.isprintable())
_COUNT = ("a whole number", lambda x: _is_whole(x) and x >= 0)
_NUMBER = ("a number", _is_number)
_SHARE = ("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1)
_AMOUNT = (
    "a number of at least 0",
    lambda x: _is_number(x) and 0 <= x <= sys.float_info.max,
)
_MOST_STEPS = 2**63 - 1  # as NumPy counts
# What a run is of: a condition of the article, or an arm of a study.
_OF_CONDITION = {
    "condition": (
        "one of the article's",
        lambda x: _is_whole(x) and x in range(len(article.CONDITIONS)),
    ),
}
_OF_STUDY = {"study": _TEXT, "arm": _TEXT}
_FACTS = {
    "seed": _COUNT,
    "steps": (
        "a number of steps",
        lambda x: _is_whole(x) and 1 <= x <= _MOST_STEPS,
    ),
    "dataset": _TEXT,
}
_OPTIONAL_FACTS = {
    **dict.fromkeys(("dataset_version", "dataset_copy"), _TEXT),
    **dict.fromkeys(("input", "layer", "optimizer", "backend"), _TEXT),
    **dict.fromkeys(
        ("device", "processor", "revision", "distribution", "placement"), _TEXT
    ),
    **dict.fromkeys(("eval_every", "batch_size", "replicas", "cores"), _COUNT),
    "learning_rate": _NUMBER,
    "optimizer_epsilon": (
        "a number or null",
        lambda x: x is None or _is_number(x),
    ),
    **dict.fromkeys(
        ("shuffle", "synchronized"),
        ("true or false", lambda x: isinstance(x, bool)),
    ),
    "onednn": (
        "true, false or null",
        lambda x: x is None or isinstance(x, bool),
    ),
    "packages": ("an object", lambda x: isinstance(x, dict)),
    "continued_by": (
        "a list of objects",
        lambda x: isinstance(x, list) and all(isinstance(y, dict) for y in x),
    ),
}
# What recalibration makes of the trained weights; beside the weights.
RECALIBRATED = "recalibrated.json"
_METRICS = {"test_accuracy": _SHARE}
_TIMING = dict.fromkeys(
    ("train_seconds", "eval_seconds", "images_per_second"), _AMOUNT
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One condition trained from one seed, as far as it has come.

    Attributes:
        condition: the `article.Condition`.
        seed: int.
        facts: `run.json`, what made the run.
        steps: int array, training steps at which it was evaluated.
        accuracies: float array of the same length, test accuracy, 0 to 1.
        train_seconds: time spent in training steps, or None if not kept.
        eval_seconds: time spent in evaluations, or None if not kept.
        images_per_second: median over the stretches between evaluations, or
            None.
        recalibrated: test accuracy of the trained weights with statistics of
            `keras_bn.recalibrate`, 0 to 1, or None.
    """

    condition: article.Condition
    seed: int
    facts: dict
    steps: np.ndarray
    accuracies: np.ndarray
    train_seconds: float | None
    eval_seconds: float | None
    images_per_second: float | None
    recalibrated: float | None = None

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def finished(self) -> bool:
        return self.last_step >= self.facts["steps"]

    @property
    def hardware(self) -> str:
        """The device, the processor and how many of its cores; one line."""
        device = self.facts.get("device") or "device not recorded"
        processor = self.facts.get("processor") or "processor not recorded"
        cores = self.facts.get("cores") or "unknown number of"
        plural = "" if cores == 1 else "s"
        return f"{device}, {processor}, {cores} core{plural}"


def read_runs(results_dir: Path | str) -> list[Run]:
    """Reads every run below a folder of results.

    Args:
        results_dir: folder with `<condition>/<seed>/run.json`, and
            `metrics.jsonl` and `timing.jsonl` beside it, both optional for a
            run that has only begun.

    Returns:
        The runs, by condition and seed.

    Raises:
        ExperimentError: there are none, a file is damaged (its name and the
            line are given), or two runs were made with different settings.
    """
    results_dir = Path(results_dir)
    if not os.path.isdir(results_dir):
        raise ExperimentError(
            "the folder of results does not exist; give the one that "
            f"training wrote. Received: results={results_dir}"
        )
    runs = sorted(
        (_read_run(path) for path in results_dir.glob("*/*/run.json")),
        key=lambda run: (run.condition.number, run.seed),
    )
    if not runs:
        raise ExperimentError(
            f"no results in {results_dir}: train a condition first "
            "(python -m experiments.train), or give another folder"
        )
    same_settings.require_same_settings([run.facts for run in runs])
    return runs


def check_addition(results_dir: Path | str, additions: Sequence[dict]) -> None:
    """Finds out whether a folder's report could have some more runs in it.

    Args:
        results_dir: folder of all results, which need not be there yet.
        additions: what is to be in the `run.json` of each of those runs.
            Where one of them is there already, it is left to whoever goes
            on with it.

    Raises:
        ExperimentError: a file of another run is damaged, or two runs were
            made with different settings.
    """
    results_dir = Path(results_dir)
    own = {same_settings.folder_of(facts) for facts in additions}
    others = [
        _read_run(path).facts
        for path in sorted(results_dir.glob("*/*/run.json"))
        if str(path.parent.relative_to(results_dir)) not in own
    ]
    same_settings.require_same_settings([*additions, *others])


def has_files(path: Path, pattern: str) -> bool:
    """Whether a folder, which need not be there, has such files."""
    # `glob` alone fails where the name is too long to be one.
    return os.path.isdir(path) and any(path.glob(pattern))


def has_weights(folder: Path) -> bool:
    """Whether a run's folder has its final weights: training is done."""
    return os.path.exists(folder / "final.weights.h5")


def read_facts(path: Path) -> dict:
    """Reads a run.json.

    Raises:
        ExperimentError: it cannot be read, or is damaged.
    """
    facts = _parse(path, _read_text(path))
    check_facts(path, facts)
    return facts


def check_facts(where: object, facts: dict) -> None:
    """Finds out whether a value may be the content of a run.json.

    Raises:
        ExperimentError: it may not.
    """
    given = {x: _OPTIONAL_FACTS[x] for x in _OPTIONAL_FACTS if x in facts}
    whose = _OF_STUDY if "study" in facts else _OF_CONDITION
    _check(where, facts, {**whose, **_FACTS, **given})


def read_metrics(
    folder: Path, steps: int, drop_torn: bool = False
) -> list[dict]:
    """Reads the lines of a run's metrics.jsonl, none if it is not there.

    Args:
        folder: the run's.
        steps: its training steps when it is finished.
        drop_torn: whether to leave out a last line that an interruption cut
            short. Otherwise such a line is an error like any other damage.

    Returns:
        Objects with the step, which ascends, and `test_accuracy`, 0 to 1.

    Raises:
        ExperimentError: the file cannot be read, is damaged, or lacks the
            last line of a finished run.
    """
    path = folder / "metrics.jsonl"
    finished = has_weights(folder)  # asked first, for it may be finished now
    lines = _read_lines(path, steps, _METRICS, drop_torn)
    last = lines[-1]["step"] if lines else 0
    if finished and last != steps:
        raise _damaged(
            path, f"ends at step {last}, but the run is finished at {steps}"
        )
    return lines


def read_timing(
    folder: Path, steps: int, drop_torn: bool = False
) -> list[dict]:
    """Reads the lines of a run's timing.jsonl, as `read_metrics` does."""
    return _read_lines(folder / "timing.jsonl", steps, _TIMING, drop_torn)


def _damaged(where: object, reason: str) -> ExperimentError:
    return ExperimentError(
        f"{where}: {reason}; repair or delete that run's folder"
    )


def _check(where: object, values: dict, kinds: dict) -> None:
    for name, (words, fits) in kinds.items():
        if name not in values:
            raise _damaged(where, f"{name} is missing")
        if not fits(values[name]):
            value = reprlib.repr(values[name])
            raise _damaged(where, f"{name} is not {words}: {value}")


def _parse(path: Path, text: str, line: int = 1) -> dict:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        # A file of many lines counts its own; a line stands where it is.
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", "too long or too deep")
        raise _damaged(
            f"{path}, line {line}", f"not JSON ({reason})"
        ) from error
    if not isinstance(parsed, dict):
        raise _damaged(f"{path}, line {line}", "not a JSON object")
    return parsed


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _damaged(f"{path}, line {line}", "not UTF-8 text") from error
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}"
        ) from error


def _read_lines(
    path: Path, steps: int, kinds: dict, drop_torn: bool
) -> list[dict]:
    """Reads JSON lines: objects of numbers, `kinds` and a step among them."""
    if not os.path.exists(path):
        return []
    *texts, torn = _read_text(path).split("\n")
    if torn.endswith("}"):  # whole but for the end of the line
        texts.append(torn)
    elif torn and not drop_torn:
        raise ExperimentError(
            f"{path}, line {len(texts) + 1}: cut short by an interruption; "
            "give the same command again, or delete that run's folder if the "
            "run is finished"
        )
    step = (
        f"one of the steps 1 to {steps}",
        lambda x: _is_whole(x) and 1 <= x <= steps,
    )
    rows = []
    for number, text in enumerate(texts, start=1):
        row, where = _parse(path, text, number), f"{path}, line {number}"
        numbers = dict.fromkeys(row, _NUMBER)
        _check(where, row, {**numbers, "step": step, **kinds})
        if rows and row["step"] <= rows[-1]["step"]:
            raise _damaged(
                where, f"step {row['step']} after {rows[-1]['step']}"
            )
        rows.append(row)
    return rows


def _read_run(path: Path) -> Run:
    facts, folder = {**same_settings.BEFORE, **read_facts(path)}, path.parent
    named = same_settings.folder_of(facts)
    if f"{folder.parent.name}/{folder.name}" != named:
        raise ExperimentError(
            f"{path} is of condition and seed {named}; move its folder to "
            "that name"
        )
    metrics = read_metrics(folder, facts["steps"])
    timing = read_timing(folder, facts["steps"])
    speeds = [row["images_per_second"] for row in timing]
    return Run(
        condition=article.condition(facts["condition"]),
        seed=facts["seed"],
        facts=facts,
        steps=np.array([row["step"] for row in metrics], int),
        accuracies=np.array([row["test_accuracy"] for row in metrics], float),
        train_seconds=sum(row["train_seconds"] for row in timing) or None,
        eval_seconds=sum(row["eval_seconds"] for row in timing) or None,
        images_per_second=float(np.median(speeds)) if speeds else None,
        recalibrated=read_recalibrated(folder),
    )


def read_recalibrated(folder: Path) -> float | None:
    """Reads a run's test accuracy with recalibrated statistics, 0 to 1.

    None: the run has none.

    Raises:
        ExperimentError: the file is damaged.
    """
    path = folder / RECALIBRATED
    if not os.path.exists(path):
        return None
    values = _parse(path, _read_text(path))
    _check(path, values, {"test_accuracy": _SHARE})
    return values["test_accuracy"]

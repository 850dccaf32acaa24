"""Trains the article's conditions, as many as asked for, and reports on them.

    python -m experiments.reproduce
    python -m experiments.reproduce --preset=article --output=results/article
    python -m experiments.reproduce --preset=input_and_order --seeds=5

The first trains two conditions in minutes, the second all 12, which takes
days on a CPU, the third a control experiment (`experiments.controls`), whose
results are below OUTPUT/controls. A finished run is not trained again and an
interrupted one goes on, so the same command can be given until all is done;
given several times at once, on one machine or on several that share the
folder, the processes share the runs. The report is written at the end.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import ExperimentError
from experiments import article
from experiments import atomic
from experiments import control_results
from experiments import controls
from experiments import data
from experiments import launch
from experiments import many_runs
from experiments import ray_grid
from experiments import report
from experiments import report_summaries
from experiments import require_backend
from experiments import result_files
from experiments import run_settings
from experiments import train
from experiments.run_settings import Settings

# Runs of the default settings: two seeds, with oneDNN on and off.
DEFAULT_RUNS = Path(__file__).parents[1] / "results" / "default_run"
PRESETS = {
    # Condition 11, the article's best, and the same without batch
    # normalization: long enough for the moving averages to have settled.
    "quick": {"conditions": (2, 11), "steps": 600, "eval_every": 100},
    # 1,000 evaluations, as many points as the article has.
    "article": {
        "conditions": tuple(range(len(article.CONDITIONS))),
        "steps": article.STEPS,
        "eval_every": 156,
    },
    **{
        name: {
            "conditions": control.conditions,
            "steps": controls.STEPS,
            "eval_every": controls.EVAL_EVERY,
        }
        for name, control in controls.CONTROLS.items()
    },
}


def grid(conditions: Sequence[int], seeds: int, **settings) -> list[Settings]:
    """Returns the settings of every run of a grid.

    Args:
        conditions: the article's numbers.
        seeds: number of seeds; they are 0 to `seeds` - 1.
        **settings: other attributes of `Settings`, common to all.

    Raises:
        ExperimentError: a value is out of its range, or there is no run.
    """
    if seeds < 1:
        raise ExperimentError(
            f"seeds is a number of at least 1. Received: seeds={seeds}"
        )
    if not conditions:
        raise ExperimentError("give conditions, such as --conditions=2,11")
    return [
        Settings(condition=condition, seed=seed, **settings)
        for seed in range(seeds)
        for condition in sorted(set(conditions))
    ]


def run(
    grids: Mapping[Path, Sequence[Settings]],
    dataset: data.Dataset,
    ray: str = "",
) -> dict[Path, dict[int, list[float]]]:
    """Trains what is left to do of some grids.

    Several processes may do so in the same folders. Each takes a run that no
    other is training, and returns when all of them are finished.

    Args:
        grids: folder of results -> what `grid` returns.
        dataset: what to train on.
        ray: address of a Ray cluster whose workers train, see `ray_grid`;
            empty: this process trains.

    Returns:
        Of each folder, condition number -> final test accuracy (0 to 1) of
        each seed.

    Raises:
        ExperimentError: as `train.run` and `ray_grid.train`; or the report
            could not have these runs beside others in their folder.
        KeyboardInterrupt: as `train.run`.
    """
    # Found out now rather than hours into the grid.
    for output, runs in grids.items():
        for settings in runs:
            train.open_folder(settings, dataset, output).check_checkpoint()
        result_files.check_addition(
            output, [train.describe(settings, dataset) for settings in runs]
        )
    accuracies = {}
    for output, final in many_runs.train_all(grids, dataset, ray).items():
        of_conditions = accuracies.setdefault(output, {})
        for settings, accuracy in final.items():
            of_conditions.setdefault(settings.condition, []).append(accuracy)
    return accuracies


def recalibrated(
    folder: Path, runs: Sequence[Settings]
) -> dict[int, list[float]]:
    """Returns condition number -> test accuracy (0 to 1) of each seed.

    It is that of the trained weights with statistics of
    `keras_bn.recalibrate`; conditions without batch normalization have none.

    Args:
        folder: of results.
        runs: finished ones in it.

    Raises:
        ExperimentError: a file is damaged.
    """
    accuracies = {}
    for settings in runs:
        value = result_files.read_recalibrated(settings.folder(folder))
        if value is not None:
            accuracies.setdefault(settings.condition, []).append(value)
    return accuracies


def table(
    accuracies: Mapping[int, Sequence[float]],
    with_new_statistics: Mapping[int, Sequence[float]],
    steps: int,
    dataset: data.Dataset,
) -> str:
    """Returns final accuracies as text, beside the article's on CIFAR-10.

    Args:
        accuracies: what `run` returns of a folder.
        with_new_statistics: what `recalibrated` returns of it.
        steps: training steps of every run.
        dataset: what they were trained on.
    """
    comparable = dataset.name == "cifar10"
    rows = [
        (
            "condition",
            "batch norm",
            "dropout",
            "accuracy",
            "recalibrated",
            "published",
        )
    ]
    for number, values in sorted(accuracies.items()):
        condition = article.condition(number)
        rows.append(
            (
                str(number),
                condition.batch_norm,
                f"{condition.dropout:g}",
                _spread(values),
                _spread(with_new_statistics.get(number, ())),
                _published(number, steps) if comparable else "none",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
    )


def is_default(runs: Sequence[Settings]) -> bool:
    """Whether runs differ from those of no flags at all by their seed only."""
    quick = dict(PRESETS["quick"])
    default = grid(quick.pop("conditions"), seeds=1, **quick)
    return {dataclasses.replace(x, seed=0) for x in runs} == set(default)


def spread_to_expect(folder: Path = DEFAULT_RUNS) -> str:
    """Says in a line how far apart runs of the default settings lie.

    Args:
        folder: of the runs to say it of, a folder of results for each way
            of rounding.

    Raises:
        ExperimentError: there are none, or a file is damaged.
    """
    final, new, seeds = {}, [], set()
    for results in sorted(folder.iterdir()):
        for run in result_files.read_runs(results):
            name = run.condition.number
            final.setdefault(name, []).append(run.accuracies[-1])
            new += [] if run.recalibrated is None else [run.recalibrated]
            seeds.add(run.seed)
    ranges = " and ".join(
        f"condition {name} at {_range(values)}"
        for name, values in sorted(final.items())
    )
    return (
        "What to expect: a run this short depends on the seed and on how the "
        f"CPU rounds. Over {len(seeds)} seeds, with oneDNN on and off, we saw "
        f"{ranges}, recalibrated at {_range(new)}."
    )


def _range(values):
    return f"{min(values):.2f} to {max(values):.2f}"


def _spread(values):
    if not values:
        return "none"
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) == 1:
        return mean
    deviation = statistics.stdev(values)
    return f"{mean} +- {deviation:.3f} ({len(values)} seeds)"


def _published(number, steps):
    """Returns the article's accuracy as the report has it."""
    accuracy, step = report_summaries.published_at(number, steps, None)
    text = f"{accuracy:.3f}"
    return text if step == steps else f"{text} at {step:,} steps"


def define_flags() -> None:
    """Defines this program's flags."""
    run_settings.define_flags()
    flags.adopt_module_key_flags(run_settings)
    flags.DEFINE_enum(
        "preset",
        "quick",
        list(PRESETS),
        "What is left out of conditions, steps and eval_every. quick: "
        "conditions 2 and 11, 600 steps, evaluated every 100; article: all "
        "12, 156000 steps, evaluated every 156; the others: control "
        f"experiments, {controls.STEPS} steps, evaluated every "
        f"{controls.EVAL_EVERY}, each arm in a folder of its own but for that "
        "of the article's settings, which they share.",
    )
    flags.DEFINE_list(
        "conditions",
        None,
        "The article's numbers, as 2,11 (default: the preset's).",
    )
    flags.DEFINE_integer("seeds", 1, "Number of seeds.")
    flags.DEFINE_string(
        "ray",
        "",
        "Have Ray's workers train: the address of a cluster, or local for "
        "this machine's cores (default: this process trains, a run at a "
        "time).",
    )


def grids_from_flags() -> dict[Path, list[Settings]]:
    """Returns the grids that the flags ask for, by their folders of results.

    Raises:
        ExperimentError: as `grid`, or a flag would make the arms of a
            control experiment alike.
    """
    if not flags.FLAGS.output:
        raise ExperimentError(
            "output is the folder of all results. Received: an empty one"
        )
    output, preset = Path(flags.FLAGS.output), flags.FLAGS.preset
    given = {**PRESETS[preset], **run_settings.given()}
    if flags.FLAGS.conditions is not None:
        try:
            given["conditions"] = [int(x) for x in flags.FLAGS.conditions]
        except ValueError as error:
            raise ExperimentError(
                "conditions are numbers from 0 to 11, as in 2,11. Received: "
                f"conditions={','.join(flags.FLAGS.conditions)}"
            ) from error
    seeds = flags.FLAGS.seeds
    if preset not in controls.CONTROLS:
        return {output: grid(seeds=seeds, **given)}
    control = controls.CONTROLS[preset]
    for name in sorted(controls.CHANGED):
        if flags.FLAGS[name].present:
            raise ExperimentError(
                f"{name} is what arms of control experiments differ in, which "
                "share the runs of the article's settings: leave that flag "
                f"out. Received: {name}={flags.FLAGS[name].value}"
            )
    if not set(given["conditions"]) <= set(control.conditions):
        raise ExperimentError(
            f"the conditions of --preset={preset} are "
            f"{','.join(map(str, control.conditions))}. Received: "
            f"conditions={','.join(map(str, given['conditions']))}"
        )
    grids = {
        controls.folder(output, control, arm): [
            settings
            for settings in grid(seeds=seeds, **{**given, **arm.changes})
            if arm.differs_in(settings.condition)
        ]
        for arm in control.arms
    }
    grids = {folder: runs for folder, runs in grids.items() if runs}
    if len(grids) == 1:
        raise ExperimentError(
            f"all arms of --preset={preset} are alike without batch "
            "normalization: give a condition that has it. Received: "
            f"conditions={','.join(map(str, given['conditions']))}"
        )
    return grids


def main(argv):
    del argv
    grids, output = grids_from_flags(), flags.FLAGS.output
    for folder, runs in grids.items():
        for settings in runs:
            train.check_output(settings, folder)
    atomic.check_writable(Path(output) / "report.html")
    if flags.FLAGS.ray:
        ray_grid.require()
    data.check(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    require_backend()
    dataset = data.load(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    for folder, runs in grids.items():
        steps = f"{runs[0].steps:,} steps"
        print(f"{dataset.note}, {steps} -> {folder}", flush=True)
    for folder, accuracies in run(grids, dataset, flags.FLAGS.ray).items():
        if len(grids) > 1:
            print(f"{folder}:")
        runs = grids[folder]
        print(
            table(
                accuracies,
                recalibrated(folder, runs),
                runs[0].steps,
                dataset,
            )
        )
        if dataset.name == "cifar10" and is_default(runs):
            print(spread_to_expect())
    for found in control_results.read(output):
        if found.control.name == flags.FLAGS.preset:
            print("\n".join(found.verdicts()))
    if dataset.name != "cifar10":
        print(
            f"These are {dataset.name}, not CIFAR-10: this is not the "
            "article's comparison."
        )
    print(f"report: {report.write_report(output)}")


if __name__ == "__main__":
    define_flags()
    launch(main)

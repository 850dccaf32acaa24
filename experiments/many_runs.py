"""Trains many runs, whose processes may be several."""

import time
from collections.abc import Sequence
from pathlib import Path

import tqdm

from experiments import data
from experiments import ray_grid
from experiments import run_folder
from experiments import train
from experiments.run_settings import RunSettings

_WAIT_SECONDS = 2.0


def train_all(
    runs: Sequence[RunSettings],
    dataset: data.Dataset,
    output: Path | str,
    ray: str = "",
) -> dict[RunSettings, float]:
    """Trains what is left to do of some runs.

    Several processes may do so in one folder. Each takes a run that no other
    is training, and returns when all of them are finished.

    Args:
        runs: what to do.
        dataset: what to train on.
        output: folder of all results.
        ray: address of a Ray cluster whose workers train, see `ray_grid`;
            empty: this process trains.

    Returns:
        Of each run, its final test accuracy (0 to 1).

    Raises:
        ExperimentError: as `train.run` and `ray_grid.train`.
        KeyboardInterrupt: as `train.run`.
    """
    with tqdm.tqdm(
        desc=f"all {len(runs)} runs",
        total=sum(settings.steps for settings in runs),
        unit=" steps",
        disable=None,
    ) as bar:
        if ray:
            return ray_grid.train(runs, dataset, output, ray, bar.update)
        return _train(runs, dataset, output, bar)


def _train(runs, dataset, output, bar):
    final = {}
    while len(final) < len(runs):
        done = len(final)
        for settings in runs:
            if settings in final:
                continue
            try:
                metrics = train.run(settings, dataset, output, bar.update)
            except run_folder.BusyError:
                continue
            final[settings] = metrics[-1]["test_accuracy"]
        if len(final) == done:
            _wait(len(runs) - done, bar)
    return final


def _wait(missing, bar):
    """Waits for other processes: to finish runs, or to leave them behind."""
    bar.set_description(f"{missing} runs are trained by other processes")
    time.sleep(_WAIT_SECONDS)

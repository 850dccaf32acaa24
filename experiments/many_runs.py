"""Trains many runs, whose processes may be several."""

import time
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import tqdm

from experiments import data
from experiments import progress
from experiments import ray_grid
from experiments import require_backend
from experiments import run_folder
from experiments import train
from experiments.run_settings import RunSettings

_WAIT_SECONDS = 2.0


def train_all(
    grids: Mapping[Path, Sequence[RunSettings]],
    dataset: data.Dataset,
    ray: str = "",
) -> dict[Path, dict[RunSettings, float]]:
    """Trains what is left to do of some runs.

    Several processes may do so in the same folders. Each takes a run that no
    other is training, and returns when all of them are finished.

    Args:
        grids: folder of results -> the runs that belong there.
        dataset: what to train on.
        ray: address of a Ray cluster whose workers train, see `ray_grid`;
            empty: this process trains.

    Returns:
        Of each run in each folder, its final test accuracy (0 to 1).

    Raises:
        ExperimentError: as `train.run` and `ray_grid.train`.
        KeyboardInterrupt: as `train.run`.
    """
    jobs = [(path, x) for path, runs in grids.items() for x in runs]
    with progress.bar(
        f"all {len(jobs)} runs",
        sum(settings.steps for _, settings in jobs),
        " steps",
    ) as bar:
        if ray:
            final = ray_grid.train(
                jobs, dataset, _train_in_worker, ray, bar.update
            )
        else:
            final = _train(jobs, dataset, bar)
    return {
        path: {settings: final[path, settings] for settings in runs}
        for path, runs in grids.items()
    }


def _train(jobs, dataset, bar):
    final = {}
    while len(final) < len(jobs):
        done = len(final)
        for job in jobs:
            if job in final:
                continue
            output, settings = job
            try:
                metrics = train.run(settings, dataset, output, bar.update)
            except run_folder.BusyError:
                continue
            final[job] = metrics[-1]["test_accuracy"]
        if len(final) == done:
            _wait(len(jobs) - done, bar)
    return final


def _train_in_worker(output, settings, dataset):
    """Trains a run as a task of Ray's, and returns its accuracy."""
    require_backend()
    job = output, settings
    # It waits for a worker that was given up and still trains.
    return _train([job], dataset, tqdm.tqdm(disable=True))[job]


def _wait(missing, bar):
    """Waits for other processes: to finish runs, or to leave them behind."""
    bar.set_description(f"{missing} runs are trained by other processes")
    time.sleep(_WAIT_SECONDS)

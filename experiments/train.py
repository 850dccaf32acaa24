"""Trains one condition of the article.

    python -m experiments.train --condition=11 --steps=2000 --output=results/one

`experiments.distribution` says how it is spread over devices and processes.
The run's folder is ``OUTPUT/CONDITION/SEED/``; `run_folder` says what is in
it. A run that was interrupted goes on from its last checkpoint, on a CPU with
the metrics of an undisturbed run bit for bit. Told to stop by Ctrl-C or
SIGTERM, it finishes the step in hand and writes a checkpoint of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from experiments import ExperimentError
from experiments import atomic
from experiments import data
from experiments import distribution
from experiments import gpu_check
from experiments import launch
from experiments import machine
from experiments import require_backend
from experiments import result_files
from experiments import run_folder
from experiments import run_model
from experiments import run_settings
from experiments import same_settings
from experiments import training
from experiments.distribution.workers import Workers
from experiments.run_settings import RunSettings
from experiments.run_settings import Settings


def check_output(settings: RunSettings, output: Path | str) -> None:
    """Finds out, before anything is loaded, whether a run can be written.

    A finished run is only read.

    Raises:
        ExperimentError: it cannot be, or a run of other settings is there.
    """
    if not str(output):
        raise ExperimentError(
            "output is the folder of all results. Received: an empty one"
        )
    folder = settings.folder(output)
    facts = folder / "run.json"
    if os.path.exists(facts):
        # `describe` knows more of it, and takes long to find out.
        same_settings.require_settings(
            folder,
            result_files.read_facts(facts),
            dataclasses.asdict(settings) | settings.facts(),
        )
    if not result_files.has_weights(folder):
        atomic.check_folder(folder)


def run(
    settings: RunSettings,
    dataset: data.Dataset,
    output: Path | str,
    on_steps: Callable[[int], None] = lambda steps: None,
    workers: Workers | None = None,
) -> list[dict]:
    """Trains one run, or what is left of it to do.

    Args:
        settings: what to do.
        dataset: what to train on.
        output: folder of all results; the run's own is below it.
        on_steps: called with each number of training steps that is newly
            done; the first call is for those done by an earlier program.
        workers: the processes that train together, all by this call; the
            chief alone has a folder. None: this process alone, on one device.

    Returns:
        The objects in the run's metrics.jsonl; none if this is not the chief.

    Raises:
        run_folder.BusyError: another process trains this run.
        ExperimentError: the folder holds a run of other settings, or damaged
            files, or cannot be read or written to; or the processes were
            given other settings or data than this one.
        KeyboardInterrupt: the run was interrupted; it says how to go on.
    """
    workers = workers or distribution.one_device()
    if workers.processes > 1:
        facts = dataclasses.asdict(settings)
        workers.require_same(facts | {"dataset": dataset.digest[:12]})
    folder = None
    if workers.chief:
        folder = open_folder(settings, dataset, output, workers.replicas)
    trained = bool(folder and settings.trained(folder))
    if workers.from_chief(np.array(int(trained))):
        if folder:
            folder.tidy()
        on_steps(settings.steps)
    else:
        if folder:
            check_output(settings, output)
        with (
            _one_line(settings.folder(output)),
            folder.locked() if folder else contextlib.nullcontext(),
        ):
            _train(settings, dataset, folder, on_steps, workers)
    if folder and workers.processes == 1:
        # The others would wait for it.
        with _one_line(folder.path):
            settings.conclude(dataset, folder)
    return folder.metrics() if folder else []


@contextlib.contextmanager
def _one_line(folder):
    """Says in a line that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        # HDF5's own words are several lines.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ExperimentError(
            f"cannot write to {folder} ({reason}): make room, or give another "
            "output"
        ) from error


def _train(settings, dataset, folder, on_steps, workers):
    # Another process may have finished it before this one had the lock.
    if folder and settings.trained(folder):
        on_steps(settings.steps)
        return
    training.Training(settings, dataset, folder, on_steps, workers).run()


def open_folder(
    settings: RunSettings,
    dataset: data.Dataset,
    output: Path | str,
    replicas: int = 1,
) -> run_folder.RunFolder:
    """Returns the folder of a run, which need not be there yet.

    Raises:
        ExperimentError: it holds a run of other settings, or damaged files.
    """
    return run_folder.RunFolder(
        settings.folder(output), describe(settings, dataset, replicas)
    )


def describe(
    settings: RunSettings, dataset: data.Dataset, replicas: int = 1
) -> dict:
    """Returns the content of run.json: everything that made the run."""
    import keras

    optimizer = run_model.make_optimizer(settings)
    backend = keras.backend.backend()
    return {
        **dataclasses.asdict(settings),
        "replicas": replicas,
        **settings.facts(),
        "optimizer_epsilon": getattr(optimizer, "epsilon", None),
        "dataset": dataset.name,
        "dataset_version": dataset.version,
        "dataset_copy": dataset.copy,
        "backend": backend,
        "device": machine.device(),
        "processor": machine.processor(),
        "cores": machine.usable_cores(),
        "onednn": machine.onednn(),
        "packages": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "numpy": np.__version__,
            backend: importlib.import_module(backend).__version__,
        },
        "revision": machine.revision(),
    }


def from_flags() -> Settings:
    """Returns what the flags ask for; looks at all of them, without Keras.

    Raises:
        ExperimentError: a flag cannot be used.
    """
    given = run_settings.given()
    if "condition" not in given:
        raise ExperimentError("give a condition, --condition=0 to 11")
    settings = Settings(**given)
    distribution.check(
        settings,
        flags.FLAGS.time_limit,
        flags.FLAGS.cpu_devices,
        os.environ.get("KERAS_BACKEND"),
    )
    data.check(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    return settings


def main(argv):
    del argv
    if flags.FLAGS.preset == "gpu_check":
        return _check_gpu()
    settings, output = from_flags(), flags.FLAGS.output
    if settings.distribution == "none":
        # Of several processes the chief alone writes: `run` has it checked.
        check_output(settings, output)
    require_backend()
    with distribution.join(
        settings, flags.FLAGS.time_limit, flags.FLAGS.cpu_devices
    ) as workers:
        dataset = data.load(flags.FLAGS.dataset, flags.FLAGS.data_dir)
        if workers.chief:
            print(f"{dataset.note} -> {settings.folder(output)}", flush=True)
        metrics = run(settings, dataset, output, workers=workers)
        if workers.chief:
            last = metrics[-1]
            print(
                f"step {last['step']}: test accuracy "
                f"{last['test_accuracy']:.4f}"
            )


def _check_gpu():
    for name in (x.name for x in dataclasses.fields(Settings)):
        if flags.FLAGS[name].present:
            raise ExperimentError(
                "--preset=gpu_check has settings of its own: leave out "
                f"--{name}"
            )
    data.check(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    gpu_check.check_backend(os.environ.get("KERAS_BACKEND"))
    require_backend()
    for name in gpu_check.gpus():
        print(f"GPU: {name}", flush=True)
    dataset = data.load(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    print(dataset.note, flush=True)
    agree = [gpu_check.check(x, dataset) for x in gpu_check.CONDITIONS]
    if not all(agree):
        raise ExperimentError(
            "the GPU's losses differ from the CPU's: see the lines above"
        )


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_enum(
        "preset",
        None,
        ["gpu_check"],
        "gpu_check: check and time TensorFlow on this machine's GPU; no "
        "condition is given, and nothing is written.",
    )
    flags.DEFINE_integer("condition", None, "The article's number, 0 to 11.")
    flags.DEFINE_integer("seed", 0, "Of kernels, dropout and shuffling.")
    distribution.define_flags()
    run_settings.define_flags()
    flags.adopt_module_key_flags(distribution)
    flags.adopt_module_key_flags(run_settings)


if __name__ == "__main__":
    define_flags()
    launch(main)

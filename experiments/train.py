"""Trains one condition of the article.

    python -m experiments.train --condition=11 --steps=2000 --output=results/one

`experiments.distribution` says how it is spread over devices and processes.
The run's folder is ``OUTPUT/CONDITION/SEED/``; `run_folder` says what is in
it. A run that was interrupted goes on from its last evaluation, on a CPU with
the metrics of an undisturbed run bit for bit.
"""

from __future__ import annotations

import dataclasses
import importlib
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tqdm
from absl import flags

from experiments import ExperimentError
from experiments import article
from experiments import atomic
from experiments import data
from experiments import distribution
from experiments import launch
from experiments import models
from experiments import raise_if_interrupted
from experiments import require_backend
from experiments import result_files
from experiments import run_folder
from experiments import run_settings
from experiments.distribution.workers import Workers
from experiments.run_settings import Settings

if TYPE_CHECKING:
    import keras

EVALUATION_BATCH = 500


def check_output(settings: Settings, output: Path | str) -> None:
    """Finds out, before anything is loaded, whether a run can be written.

    A finished run is only read.

    Raises:
        ExperimentError: it cannot be.
    """
    if not str(output):
        raise ExperimentError(
            "output is the folder of all results. Received: an empty one"
        )
    folder = settings.folder(output)
    if not result_files.has_weights(folder):
        atomic.check_writable(folder / "run.json")


def run(
    settings: Settings,
    dataset: data.Dataset,
    output: Path | str,
    on_steps: Callable[[int], None] = lambda steps: None,
    workers: Workers = Workers(),
) -> list[dict]:
    """Trains one condition, or what is left of it to do.

    Args:
        settings: what to do.
        dataset: what to train on.
        output: folder of all results; the run's own is below it.
        on_steps: called with each number of training steps that is newly
            done; the first call is for those done by an earlier program.
        workers: the processes that train together, all by this call; the
            chief alone has a folder.

    Returns:
        The objects in the run's metrics.jsonl; none if this is not the chief.

    Raises:
        ExperimentError: the folder holds a run of other settings, or damaged
            files, or cannot be read or written to; or the processes were
            given other settings or data than this one.
        KeyboardInterrupt: the run was interrupted; it says how to go on.
    """
    if workers.processes > 1:
        facts = dataclasses.asdict(settings)
        workers.require_same(facts | {"dataset": dataset.digest[:12]})
    folder = None
    if workers.chief:
        folder = open_folder(settings, dataset, output, workers.replicas)
    if workers.from_chief(np.array(int(bool(folder and folder.finished)))):
        on_steps(settings.steps)
    else:
        if folder:
            check_output(settings, output)
        try:
            _train(settings, dataset, folder, on_steps, workers)
        except OSError as error:
            raise ExperimentError(
                f"cannot write to {settings.folder(output)} "
                f"({error.strerror}): make room, or give another output"
            ) from error
        finally:
            if folder:
                folder.close()
    return folder.metrics() if folder else []


def open_folder(
    settings: Settings,
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


def make_optimizer(settings: Settings) -> keras.optimizers.Optimizer:
    """Returns the optimizer of a run; Adam has TensorFlow 1's epsilon."""
    import keras

    rate = settings.learning_rate
    if settings.optimizer == "adam":
        return keras.optimizers.Adam(rate, epsilon=article.ADAM_EPSILON)
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(rate)
    return keras.optimizers.RMSprop(rate)


def build(settings: Settings) -> keras.Model:
    """Returns the compiled model of a run, at its initial weights."""
    import keras

    model = network(settings)
    model.compile(
        optimizer=make_optimizer(settings),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def network(settings: Settings) -> keras.Model:
    """Returns the network of a run, not compiled, at its initial weights."""
    return models.build(
        article.condition(settings.condition),
        layer=settings.layer,
        seed=settings.seed,
        synchronized=settings.synchronized,
        placement=settings.placement,
    )


def describe(
    settings: Settings, dataset: data.Dataset, replicas: int = 1
) -> dict:
    """Returns the content of run.json: everything that made the run."""
    import keras

    condition = article.condition(settings.condition)
    optimizer = make_optimizer(settings)
    backend = keras.backend.backend()
    # Every backend's tensors know their device; TensorFlow's name is a path.
    device = str(keras.ops.zeros(()).device).rsplit("device:", 1)[-1]
    return {
        **dataclasses.asdict(settings),
        "replicas": replicas,
        "batch_norm": condition.batch_norm,
        "dropout": condition.dropout,
        "optimizer_epsilon": getattr(optimizer, "epsilon", None),
        "dataset": dataset.name,
        "dataset_version": dataset.version,
        "dataset_copy": dataset.copy,
        "backend": backend,
        "device": device,
        "packages": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "numpy": np.__version__,
            backend: importlib.import_module(backend).__version__,
        },
        "revision": _revision(),
    }


def _revision():
    """Returns git's name of this code, with "-dirty" if it was changed."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _train(settings, dataset, folder, on_steps, workers):
    batches = data.Batches(
        dataset,
        settings.batch_size,
        settings.input,
        settings.shuffle,
        settings.seed,
    )
    test_images = data.inputs(dataset, settings.input)(dataset.test_images)
    name = f"condition {settings.condition}, seed {settings.seed}"
    model = build(settings)
    step = folder.resume(model) if folder else 0
    step = saved = int(workers.from_chief(np.array(step)))
    workers.start(model, lambda: build(settings))
    on_steps(step)
    bar = tqdm.tqdm(
        desc=name,
        total=settings.steps * settings.batch_size,
        initial=step * settings.batch_size,
        unit=" images",
        unit_scale=True,
        disable=None if folder else True,
        leave=False,
    )
    try:
        while step < settings.steps:
            until = step - step % settings.eval_every + settings.eval_every
            until = min(until, settings.steps)
            train, began = Mean(), time.perf_counter()
            while step < until:
                raise_if_interrupted()
                inputs, labels = batches[step]
                logs = workers.train_on_batch(inputs, labels)
                train.add(logs, len(labels))
                step += 1
                on_steps(1)
                bar.set_postfix(train.values(), refresh=False)
                bar.update(len(labels))
            trained = time.perf_counter()
            workers.collect()
            test = _evaluate_together(
                workers, model, test_images, dataset.test_labels
            )
            metrics = {
                "step": step,
                "train_loss": train.values()["loss"],
                "train_accuracy": train.values()["accuracy"],
                "test_loss": test["loss"],
                "test_accuracy": test["accuracy"],
            }
            timing = {
                "step": step,
                "train_seconds": trained - began,
                "eval_seconds": time.perf_counter() - trained,
                "images_per_second": train.count / (trained - began),
            }
            if folder:
                folder.record(metrics, timing, model)
            saved = step
        if folder:
            trained = network(settings)
            trained.set_weights(model.get_weights())
            folder.finish(trained)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{name}: stopped after step {step}; the same command goes on "
            f"from step {saved}"
        ) from None
    finally:
        bar.close()


def _evaluate_together(workers, model, images, labels):
    """Evaluates with each process a share of the images."""
    if workers.processes == 1:
        return evaluate(model, images, labels)
    share = slice(workers.process, None, workers.processes)
    count = len(labels[share])
    sums = np.zeros(3)
    if count:
        own = evaluate(model, images[share], labels[share])
        sums = np.array([own["loss"], own["accuracy"], 1.0]) * count
    loss, accuracy, total = workers.sum(sums)
    return {"loss": float(loss / total), "accuracy": float(accuracy / total)}


def evaluate(
    model: keras.Model, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Returns a compiled model's mean "loss" and "accuracy" in test.

    Args:
        model: from images to logits, compiled with the accuracy.
        images: float32 (images, height, width, channels).
        labels: int32 (images,).
    """
    mean = Mean()
    for start in range(0, len(labels), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        logs = model.test_on_batch(images[rows], labels[rows], return_dict=True)
        mean.add(logs, len(labels[rows]))
    return mean.values()


class Mean:
    """Means over images of what Keras reports batch by batch."""

    def __init__(self):
        self.count = 0
        self._sums = {}

    def add(self, logs: dict[str, float], count: int) -> None:
        """Adds a batch of `count` images, whose means are `logs`."""
        self.count += count
        for name, value in logs.items():
            total = self._sums.get(name, 0.0) + float(value) * count
            self._sums[name] = total

    def values(self) -> dict[str, float]:
        """Returns the means so far."""
        return {name: x / self.count for name, x in self._sums.items()}


def main(argv):
    del argv
    given = run_settings.given()
    if "condition" not in given:
        raise ExperimentError("give a condition, --condition=0 to 11")
    settings, output = Settings(**given), flags.FLAGS.output
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


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_integer(
        "condition", None, "The article's number, 0 to 11; required."
    )
    flags.DEFINE_integer("seed", 0, "Of kernels, dropout and shuffling.")
    distribution.define_flags()
    run_settings.define_flags()
    flags.adopt_module_key_flags(distribution)
    flags.adopt_module_key_flags(run_settings)


if __name__ == "__main__":
    define_flags()
    launch(main)

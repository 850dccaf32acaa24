"""The loop of a run: steps, evaluations, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from experiments import Stopped
from experiments import data
from experiments import evaluation
from experiments import interruptions_deferred
from experiments import progress
from experiments import raise_if_interrupted
from experiments import run_folder
from experiments import run_model
from experiments.checkpoint import Position
from experiments.distribution.workers import Workers
from experiments.run_settings import RunSettings


class Training:
    """Trains what is left to do of one run.

    Args:
        settings: of the run.
        dataset: what to train on.
        folder: the run's, locked; None if this process is not the chief.
        on_steps: called with each number of training steps newly done; first
            with those done by an earlier program.
        workers: the processes that train together.
    """

    def __init__(
        self,
        settings: RunSettings,
        dataset: data.Dataset,
        folder: run_folder.RunFolder | None,
        on_steps: Callable[[int], None],
        workers: Workers,
    ):
        self._settings = settings
        self._all_images = dataset
        self._dataset = settings.images(dataset)
        self._folder = folder
        self._on_steps = on_steps
        self._workers = workers
        self._name = settings.name

    def run(self) -> None:
        """Trains, and writes what `run_folder` says.

        Raises:
            OSError: the folder cannot be written to.
            KeyboardInterrupt: the program was told to stop; it says where
                the same command goes on.
        """
        settings, folder, workers = self._settings, self._folder, self._workers
        self._batches = data.Batches(
            self._dataset,
            settings.batch_size,
            settings.input,
            settings.shuffle,
            settings.seed,
        )
        prepare = data.inputs(self._dataset, settings.input)
        self._test_images = prepare(self._dataset.test_images)
        self._model = run_model.build(settings)
        position = folder.resume(self._model) if folder else Position(0, 0)
        step, recorded = workers.from_chief(
            np.array([position.step, position.recorded])
        )
        self._begin(
            dataclasses.replace(
                position, step=int(step), recorded=int(recorded)
            )
        )
        if not self._step:
            settings.begin(self._model, self._all_images)
        workers.start(self._model, lambda: run_model.build(settings))
        self._on_steps(self._step)
        self._bar = progress.bar(
            self._name,
            settings.steps,
            " steps",
            initial=self._step,
            disable=not folder,
            leave=False,
        )
        try:
            # Several processes must not wait for one that was told to stop.
            with contextlib.ExitStack() as stack:
                if workers.processes == 1:
                    stack.enter_context(interruptions_deferred())
                self._train()
        except Stopped:
            if folder and workers.processes == 1:
                self._save()
            raise self._stopped() from None
        except KeyboardInterrupt:
            raise self._stopped() from None
        finally:
            self._bar.close()
            if folder:
                folder.close()

    def _begin(self, position):
        self._step, self._recorded = position.step, position.recorded
        self._mean = evaluation.Mean(position.images, position.sums)
        self._train_seconds = position.train_seconds

    def _stopped(self):
        saved = "the chief's last checkpoint"
        if self._folder:
            saved = f"step {self._folder.saved}"
        return KeyboardInterrupt(
            f"{self._name}: stopped after step {self._step}; the same command "
            f"goes on from {saved}"
        )

    def _train(self):
        every = self._settings.eval_every
        while self._recorded < self._settings.steps:
            until = self._recorded - self._recorded % every + every
            until = min(until, self._settings.steps)
            while self._step < until:
                raise_if_interrupted()
                self._take_steps(until)
            self._evaluate()
        if self._folder:
            trained = run_model.network(self._settings)
            trained.set_weights(self._model.get_weights())
            self._folder.finish(trained)

    def _take_steps(self, until):
        began = time.perf_counter()
        reports = self._workers.take_steps(self._batches, self._step, until)
        self._train_seconds += time.perf_counter() - began
        for report in reports:
            self._mean.add(report, self._settings.batch_size)
        self._step += len(reports)
        self._bar.set_postfix(self._mean.values(), refresh=False)
        self._bar.update(len(reports))
        self._on_steps(len(reports))

    def _evaluate(self):
        began = time.perf_counter()
        self._workers.collect()
        test = self._test()
        train, seconds = self._mean, self._train_seconds
        metrics = {
            "step": self._step,
            "train_loss": train.values()["loss"],
            "train_accuracy": train.values()["accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            **self._settings.observe(self._model, self._dataset),
        }
        timing = {
            "step": self._step,
            "train_seconds": seconds,
            "eval_seconds": time.perf_counter() - began,
            "images_per_second": train.count / seconds,
        }
        if self._folder:
            self._folder.record(metrics, timing, self._model)
        self._begin(Position(self._step, recorded=self._step))

    def _test(self):
        """Evaluates with each process a share of the images."""
        labels, workers = self._dataset.test_labels, self._workers
        if workers.processes == 1:
            return workers.evaluate(self._test_images, labels)
        share = slice(workers.process, None, workers.processes)
        count = len(labels[share])
        sums = np.zeros(3)
        if count:
            own = workers.evaluate(self._test_images[share], labels[share])
            sums = np.array([own["loss"], own["accuracy"], 1.0]) * count
        loss, accuracy, total = workers.sum(sums)
        return {
            "loss": float(loss / total),
            "accuracy": float(accuracy / total),
        }

    def _save(self):
        """Writes a checkpoint between two evaluations."""
        self._workers.collect()
        self._folder.save(
            self._model,
            Position(
                self._step,
                self._recorded,
                self._mean.count,
                self._mean.sums,
                self._train_seconds,
            ),
        )

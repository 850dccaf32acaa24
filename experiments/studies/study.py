"""The shape that all studies have: settings, run, figure, verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments import ExperimentError
from experiments import data
from experiments import many_runs
from experiments import report_plots
from experiments import same_settings
from experiments import train
from experiments.controls import Arm
from experiments.studies import records
from experiments.studies import small_networks
from experiments.studies import verdict
from experiments.studies.records import Record
from experiments.studies.settings import StudySettings
from experiments.studies.settings import first
from experiments.studies.verdict import Answer
from experiments.studies.verdict import Question

if TYPE_CHECKING:
    import keras

FOLDER = "studies"
# In the name of an arm that was trained once more with Keras's layer.
KERAS = "@keras"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a study trains.

    Attributes:
        seeds: number of seeds, from 0.
        steps: training steps of a run.
        eval_every: training steps between evaluations.
        train_images, test_images: how many, at most.
        batch_size: images in a step.
        arms: names of the arms; None: all.
    """

    seeds: int
    steps: int
    eval_every: int
    train_images: int
    test_images: int
    batch_size: int = 64
    arms: tuple[str, ...] | None = None


# Six epochs: the test loss of the network without normalization has flattened.
REAL = Size(
    seeds=4, steps=960, eval_every=60, train_images=10_000, test_images=2_000
)
QUICK = Size(
    seeds=2, steps=8, eval_every=2, train_images=256, test_images=200
)


class Study:
    """A claim, and how it is measured.

    Attributes:
        name: of its module and folder.
        title: a few words.
        claim: one sentence.
        source: who says so.
        arms: the choices of settings.
        questions: what is asked of the results; the claim holds where all
            are answered with "supported".
        axis: what else the verdict may depend on, after "depends on".
        would_change: what would change the verdict, one sentence.
        against: what well-known papers say otherwise; may be empty.
        real, quick: how much is trained.
        loss: which of a run's losses must have flattened.
        unit: what `figure` draws along its axis.
    """

    name: str
    title: str
    claim: str
    source: str
    arms: Sequence[Arm]
    questions: Sequence[Question]
    axis: str
    would_change: str
    against = ""
    real = REAL
    quick = QUICK
    loss = "test_loss"
    unit = "test accuracy"

    # Settings.

    def settings(self, quick: bool, layer: str) -> list[StudySettings]:
        """Returns the settings of every run.

        Args:
            quick: whether to train a little alone, for tests.
            layer: whose batch normalization; with "keras" only what has one
                that Keras has is run, in arms of names of their own.
        """
        size = self.quick if quick else self.real
        arms = [x for x in self.arms if x.name in (size.arms or [x.name])]
        return [
            settings
            for seed in range(size.seeds)
            for arm in arms
            for settings in _of_layer(self._of_arm(arm, seed, size), layer)
        ]

    def _of_arm(self, arm, seed, size):
        values = {
            **{
                name: getattr(size, name)
                for name in (
                    "steps",
                    "eval_every",
                    "train_images",
                    "test_images",
                    "batch_size",
                )
            },
            **arm.changes,
        }
        return self.adjusted(
            StudySettings(study=self.name, arm=arm.name, seed=seed, **values)
        )

    def adjusted(self, settings: StudySettings) -> StudySettings:
        """Returns the settings of a run with what follows from its arm."""
        return settings

    # Run.

    def run(
        self,
        dataset: data.Dataset,
        output: Path | str,
        quick: bool = False,
        layer: str = "keras_bn",
    ) -> None:
        """Trains what is left to do.

        Args:
            dataset: what `settings.shrink` returned.
            output: folder of all results.
            quick, layer: as `settings` has them.

        Raises:
            ExperimentError: the folder holds results of other settings.
            KeyboardInterrupt: the same call goes on.
        """
        folder = self.folder(output)
        done = records.read(folder)
        left = []
        for settings in self.settings(quick, layer):
            record = done.get(settings.arm, {}).get(settings.seed)
            if record is None:
                left.append(settings)
            else:
                same_settings.require_settings(
                    folder / records.FILE,
                    record.facts,
                    train.describe(settings, dataset),
                )
        if left:
            self.train(left, dataset, folder)

    def train(
        self,
        runs: Sequence[StudySettings],
        dataset: data.Dataset,
        folder: Path,
    ) -> None:
        """Trains some runs, and adds them to the records."""
        many_runs.train_all({folder: runs}, dataset)

    def network(self, settings: StudySettings) -> keras.Model:
        """Returns a run's network at its initial weights, not compiled."""
        return small_networks.build(settings.architecture, settings.seed)

    def images(
        self, settings: StudySettings, dataset: data.Dataset
    ) -> data.Dataset:
        """Returns what of a data set a run trains and is tested on."""
        return first(dataset, settings.train_images, settings.test_images)

    def begin(
        self,
        settings: StudySettings,
        model: keras.Model,
        dataset: data.Dataset,
    ) -> None:
        """Gives a compiled model other weights to begin with."""

    def observe(
        self,
        settings: StudySettings,
        model: keras.Model,
        dataset: data.Dataset,
    ) -> dict[str, float]:
        """Returns what is measured at each evaluation beside the usual."""
        return {}

    def measure(
        self,
        settings: StudySettings,
        model: keras.Model,
        dataset: data.Dataset,
    ) -> dict[str, float]:
        """Returns what is measured of a trained and compiled model."""
        return {}

    # Results.

    def folder(self, output: Path | str) -> Path:
        """Returns the study's folder below that of all results."""
        return Path(output) / FOLDER / self.name

    def quantities(
        self, runs: Mapping[str, Mapping[int, Record]]
    ) -> dict[str, dict[int, float]]:
        """Returns what questions are asked of: name -> seed -> value.

        Here the test accuracy of each arm, the mean over the last quarter
        of the evaluations.

        Args:
            runs: name of an arm -> seed -> its record.
        """
        return {
            arm: {seed: x.last("test_accuracy") for seed, x in own.items()}
            for arm, own in runs.items()
        }

    def read(self, output: Path | str) -> Results | None:
        """Reads what the study has come to; None if there is nothing yet.

        Raises:
            ExperimentError: a file is damaged, or its runs do not belong
                together.
        """
        runs = records.read(self.folder(output))
        if not runs:
            return None
        facts = [x.facts for own in runs.values() for x in own.values()]
        names = ("study", "dataset", "dataset_version", "dataset_copy")
        for name in (*names, "backend"):
            if len({one.get(name) for one in facts}) > 1:
                raise ExperimentError(
                    f"{self.folder(output) / records.FILE}: its runs differ "
                    f"in {name}; delete it to have the study run anew"
                )
        return Results(self, runs)

    # Figure.

    def words(self, arm: str) -> str:
        """Returns what an arm is called in figures."""
        return next(x.words for x in self.arms if x.name == arm)

    def figure(self, results: Results) -> str:
        """Draws the results, as SVG; here a row of dots for each arm."""
        quantities = results.quantities
        groups = [(self.words(x), quantities[x]) for x in results.arms]
        return report_plots.draw_dots(
            f"study_{self.name}", groups, self.unit
        )

    def caption(self, results: Results) -> str:
        """Says what the figure shows."""
        return (
            "Each dot is a seed, the bar their mean: "
            f"{self.unit}, the mean of the last quarter of the evaluations."
        )


@dataclasses.dataclass(frozen=True)
class Results:
    """What a study has come to.

    Attributes:
        study: the `Study`.
        runs: name of an arm -> seed -> its record.
    """

    study: Study
    runs: Mapping[str, Mapping[int, Record]]

    @property
    def arms(self) -> list[str]:
        """The names of the study's own arms that have results."""
        return [x.name for x in self.study.arms if x.name in self.runs]

    @property
    def facts(self) -> dict:
        """The content of the run.json of one of the runs."""
        return next(iter(next(iter(self.runs.values())).values())).facts

    @property
    def quantities(self) -> dict[str, dict[int, float]]:
        return self.study.quantities(
            {x: own for x, own in self.runs.items() if KERAS not in x}
        )

    @property
    def answers(self) -> list[Answer]:
        return self._answers(
            {x: own for x, own in self.runs.items() if KERAS not in x}
        )

    @property
    def answers_of_keras(self) -> list[Answer]:
        """The same where Keras's layer took the place of ours, if it did."""
        theirs = {
            arm.removesuffix(KERAS): own
            for arm, own in self.runs.items()
            if arm.endswith(KERAS)
        }
        if not theirs:
            return []
        ours = {x: own for x, own in self.runs.items() if KERAS not in x}
        return self._answers({**ours, **theirs})

    @property
    def verdict(self) -> str:
        """The verdict on the claim."""
        return verdict.overall(self.answers, self.study.axis)

    def _answers(self, runs):
        losses = {
            arm: [x.lines[self.study.loss] for x in own.values()]
            for arm, own in runs.items()
            if all(self.study.loss in x.lines for x in own.values())
        }
        quantities = self.study.quantities(runs)
        return [
            verdict.answer(question, quantities, losses, self._unfit)
            for question in self.study.questions
        ]

    @property
    def _unfit(self):
        """Why no verdict may be made of these runs; empty if one may."""
        if self.facts["dataset"] != "cifar10":
            return f"measured on {self.facts['dataset']}"
        steps = {
            x.arm: x.steps for x in self.study.settings(False, "keras_bn")
        }
        for arm, own in self.runs.items():
            for record in own.values():
                if record.facts["steps"] != steps[arm.removesuffix(KERAS)]:
                    return "of another setting than the real one"
        return ""


def curves(
    runs: Mapping[int, Record], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of an arm's evaluations, and its values over seeds.

    Args:
        runs: seed -> record.
        name: of the value.

    Returns:
        Steps, and values shaped (seeds, steps).
    """
    some = list(runs.values())
    return some[0].lines["step"], np.stack([x.lines[name] for x in some])


def _of_layer(settings, layer):
    """The settings with a layer, in a list; an empty one if it has none."""
    architecture = settings.architecture
    if layer != "keras":
        return [settings]
    theirs = architecture.normalization.startswith("batch")
    if not theirs or architecture.virtual_batch_size:
        return []
    return [with_keras_layer(settings)]


def with_keras_layer(settings: StudySettings) -> StudySettings:
    """Returns a run's settings with Keras's layer, in an arm of its own."""
    architecture = dataclasses.replace(settings.architecture, layer="keras")
    arm = settings.arm + KERAS
    return dataclasses.replace(settings, arm=arm, architecture=architecture)

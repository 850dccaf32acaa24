"""What a run is asked to do, and the flags that say it."""

from __future__ import annotations

import abc
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import ExperimentError
from experiments import article
from experiments import data
from experiments import models

if TYPE_CHECKING:
    import keras

    from experiments.run_folder import RunFolder

OPTIMIZERS = ("adam", "sgd", "rmsprop")
# How a run is spread, and the backend that does it; None: any.
DISTRIBUTIONS = {
    "none": None,
    "mirrored": "tensorflow",
    "multiworker": "tensorflow",
    "data_parallel": "jax",
    "ddp": "torch",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(abc.ABC):
    """What any run is asked to do, whatever network it trains.

    Attributes:
        seed: of the initial kernels, dropout and shuffling.
        steps: training steps.
        eval_every: training steps between evaluations; the last step always
            has one.
        batch_size: images in a step.
        optimizer: one of `OPTIMIZERS`.
        learning_rate: constant over the run.
        input: "raw" or "standardized", see `data.inputs`.
        shuffle: whether each epoch has an order of its own.

    Raises:
        ExperimentError: a value is out of its range.
    """

    seed: int = 0
    steps: int = 600
    eval_every: int = 100
    batch_size: int = article.BATCH_SIZE
    optimizer: str = "adam"
    learning_rate: float = article.LEARNING_RATE
    input: str = "raw"
    shuffle: bool = False

    def __post_init__(self):
        for name, least in (
            ("seed", 0),
            ("steps", 1),
            ("eval_every", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ExperimentError(
                    f"{name} is a whole number of at least {least}. "
                    f"Received: {name}={getattr(self, name)}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ExperimentError(
                "learning_rate is a positive number. "
                f"Received: learning_rate={self.learning_rate}"
            )
        self._require_choices(optimizer=OPTIMIZERS, input=data.INPUTS)

    def _require_choices(self, **choices):
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ExperimentError(
                    f"{name} is one of {', '.join(allowed)}. "
                    f"Received: {name}={getattr(self, name)!r}"
                )

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What the run is called where it is talked about."""

    @abc.abstractmethod
    def folder(self, output: Path | str) -> Path:
        """Returns the run's own folder below that of all results."""

    @abc.abstractmethod
    def network(self) -> keras.Model:
        """Returns the network, not compiled, at its initial weights."""

    def facts(self) -> dict:
        """Returns what run.json says beside the attributes."""
        return {}

    def images(self, dataset: data.Dataset) -> data.Dataset:
        """Returns what of a data set the run trains and is tested on."""
        return dataset

    def begin(self, model: keras.Model, dataset: data.Dataset) -> None:
        """Gives a compiled model other weights to begin with.

        Args:
            model: of `network`.
            dataset: all of it, of which `images` chooses.
        """

    def observe(
        self, model: keras.Model, dataset: data.Dataset
    ) -> dict[str, float]:
        """Returns what a line of metrics.jsonl says beside the usual.

        Args:
            model: compiled, as it is at that step.
            dataset: what `images` returned.
        """
        return {}

    def trained(self, folder: RunFolder) -> bool:
        """Whether there is nothing left to train.

        Args:
            folder: the run's.
        """
        return folder.finished

    def conclude(self, dataset: data.Dataset, folder: RunFolder) -> None:
        """Writes what is made of a finished run, if it is not there yet.

        Args:
            dataset: all of it, of which `images` chooses.
            folder: the run's.
        """


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """What a run of the article's experiment is asked to do.

    The defaults are the article's settings, but fewer steps.

    Attributes:
        condition: the article's number, 0 to 11.
        layer: "keras_bn" or "keras", see `models.build`.
        placement: "after", "before" or "input", see `models.build`.
        distribution: one of `DISTRIBUTIONS`, see `experiments.distribution`.
        synchronized: whether batch normalization takes the moments of the
            batch over all replicas.

    Raises:
        ExperimentError: a value is out of its range.
    """

    condition: int
    layer: str = "keras_bn"
    placement: str = "after"
    distribution: str = "none"
    synchronized: bool = False

    def __post_init__(self):
        article.condition(self.condition)
        super().__post_init__()
        self._require_choices(
            layer=models.LAYERS,
            placement=models.PLACEMENTS,
            distribution=DISTRIBUTIONS,
        )

    @property
    def name(self):
        return f"condition {self.condition}, seed {self.seed}"

    def folder(self, output):
        return Path(output) / str(self.condition) / str(self.seed)

    def network(self):
        return models.build(
            article.condition(self.condition),
            layer=self.layer,
            seed=self.seed,
            synchronized=self.synchronized,
            placement=self.placement,
        )

    def facts(self):
        condition = article.condition(self.condition)
        return {
            "batch_norm": condition.batch_norm,
            "dropout": condition.dropout,
        }

    def trained(self, folder):
        # Results are handed on without their weights.
        return folder.finished or folder.stripped

    def conclude(self, dataset, folder):
        from experiments import recalibrated

        recalibrated.write(self, dataset, folder)


def define_flags() -> None:
    """Defines the flags that `train` and `reproduce` have in common.

    The program adopts them with `flags.adopt_module_key_flags`, for --help.
    """
    default = {x.name: x.default for x in dataclasses.fields(Settings)}
    # None tells `reproduce` to go by its preset.
    for name, meaning in (
        ("steps", "Training steps"),
        ("eval_every", "Training steps between evaluations"),
    ):
        flags.DEFINE_integer(
            name,
            None,
            f"{meaning} (default: {default[name]}, or what a preset says).",
        )
    flags.DEFINE_integer("batch_size", default["batch_size"], "Images a step.")
    flags.DEFINE_enum(
        "optimizer", default["optimizer"], OPTIMIZERS, "What updates weights."
    )
    flags.DEFINE_float(
        "learning_rate", default["learning_rate"], "Constant over the run."
    )
    flags.DEFINE_enum(
        "input",
        default["input"],
        data.INPUTS,
        "raw: pixels of 0 to 255; standardized: mean 0, deviation 1 a channel.",
    )
    flags.DEFINE_bool("shuffle", False, "Give each epoch an order of its own.")
    flags.DEFINE_enum(
        "layer",
        default["layer"],
        models.LAYERS,
        "Whose BatchNormalization to train with.",
    )
    flags.DEFINE_enum(
        "placement",
        default["placement"],
        models.PLACEMENTS,
        "Where it stands: after the activation, before it, or on the images "
        "alone.",
    )
    define_data_flags()
    flags.DEFINE_string("output", "results", "Folder of all results.")


def define_data_flags() -> None:
    """Defines the flags that say what to train on; adopted likewise."""
    flags.DEFINE_enum(
        "dataset",
        "auto",
        data.DATASETS,
        "auto: CIFAR-10 if it can be had, else the bundled digits.",
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "TensorFlow Datasets' folder (default: TFDS_DATA_DIR, or else "
        "~/tensorflow_datasets).",
    )


def given() -> dict:
    """Returns the flags given that are attributes of `Settings`."""
    values = flags.FLAGS.flag_values_dict()
    names = [x.name for x in dataclasses.fields(Settings)]
    return {x: values[x] for x in names if values.get(x) is not None}

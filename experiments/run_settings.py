"""What a run is asked to do, and the flags that say it."""

import dataclasses
import math
from pathlib import Path

from absl import flags

from experiments import ExperimentError
from experiments import article
from experiments import data
from experiments import models

OPTIMIZERS = ("adam", "sgd", "rmsprop")
# How a run is spread, and the backend that does it; None: any.
DISTRIBUTIONS = {
    "none": None,
    "mirrored": "tensorflow",
    "multiworker": "tensorflow",
    "data_parallel": "jax",
    "ddp": "torch",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is asked to do: the article's settings, but fewer steps.

    Attributes:
        condition: the article's number, 0 to 11.
        seed: of the initial kernels, dropout and shuffling.
        steps: training steps.
        eval_every: training steps between evaluations; the last step always
            has one.
        batch_size: images in a step.
        optimizer: one of `OPTIMIZERS`.
        learning_rate: constant over the run.
        input: "raw" or "standardized", see `data.inputs`.
        shuffle: whether each epoch has an order of its own.
        layer: "keras_bn" or "keras", see `models.build`.
        placement: "after", "before" or "input", see `models.build`.
        distribution: one of `DISTRIBUTIONS`, see `experiments.distribution`.
        synchronized: whether batch normalization takes the moments of the
            batch over all replicas.

    Raises:
        ExperimentError: a value is out of its range.
    """

    condition: int
    seed: int = 0
    steps: int = 600
    eval_every: int = 100
    batch_size: int = article.BATCH_SIZE
    optimizer: str = "adam"
    learning_rate: float = article.LEARNING_RATE
    input: str = "raw"
    shuffle: bool = False
    layer: str = "keras_bn"
    placement: str = "after"
    distribution: str = "none"
    synchronized: bool = False

    def __post_init__(self):
        article.condition(self.condition)
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
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("input", data.INPUTS),
            ("layer", models.LAYERS),
            ("placement", models.PLACEMENTS),
            ("distribution", DISTRIBUTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ExperimentError(
                    f"{name} is one of {', '.join(choices)}. "
                    f"Received: {name}={getattr(self, name)!r}"
                )

    def folder(self, output: Path | str) -> Path:
        """Returns the run's own folder below that of all results."""
        return Path(output) / str(self.condition) / str(self.seed)


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

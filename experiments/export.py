"""Publishes a trained network, for model servers and other runtimes.

    python -m experiments.export --model=results/one/11/0 --output=models/one

MODEL is the folder of a finished run, as `experiments.train` writes it, or a
.keras file of a network of the same images and classes. OUTPUT/1 becomes a
TensorFlow SavedModel, OUTPUT/2 the next one, by `keras_bn.export_saved_model`:
it takes pixels of 0 to 255 and scales them as training did, knows the classes'
names, and has batch normalization folded in. Printed is what was folded and
what was not and why, how far the outputs are from the network's, the latency
before and after folding, and the test accuracy before, after, and with
weights of 8 bits behind it. Nothing is published where the outputs differ.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

import keras_bn_checks
from experiments import ExperimentError
from experiments import atomic
from experiments import data
from experiments import evaluation
from experiments import launch
from experiments import require_backend
from experiments import result_files
from experiments import run_model
from experiments import run_settings
from experiments import same_settings
from experiments.run_settings import Settings

if TYPE_CHECKING:
    import keras

# Test images that the export is checked on, and warmed up with.
IMAGES = 64


def read_run(folder: Path) -> tuple[Settings, dict]:
    """Returns the settings of a finished run, and its run.json.

    Raises:
        ExperimentError: it is not there, not finished or damaged.
    """
    path = folder / "run.json"
    if not os.path.exists(path):
        raise ExperimentError(
            "model is a run's folder, RESULTS/CONDITION/SEED, or a .keras "
            f"file. Received: model={folder}, which has no run.json"
        )
    facts = {**same_settings.BEFORE, **result_files.read_facts(path)}
    names = [field.name for field in dataclasses.fields(Settings)]
    missing = [name for name in names if name not in facts]
    if missing:
        raise ExperimentError(
            f"{path} does not say {', '.join(missing)}: train the run anew"
        )
    if not result_files.has_weights(folder):
        raise ExperimentError(
            f"the run in {folder} has no trained weights: give its training "
            "command again first, or with another output if its results were "
            "kept without weights"
        )
    return Settings(**{name: facts[name] for name in names}), facts


def load_run(folder: Path, settings: Settings) -> keras.Model:
    """Returns the trained network of a run.

    Raises:
        ExperimentError: its weights cannot be read.
    """
    network = run_model.network(settings)
    weights = folder / "final.weights.h5"
    try:
        network.load_weights(weights)
    except Exception as error:  # h5py's and Keras's own
        raise ExperimentError(f"{weights} cannot be read") from error
    return network


def require_file(path: Path) -> None:
    """Finds out whether a file is there.

    Raises:
        ExperimentError: it is not.
    """
    if not path.is_file():
        raise ExperimentError(f"there is no such file. Received: model={path}")


def load_file(path: Path) -> keras.Model:
    """Returns the network of a .keras file.

    Raises:
        ExperimentError: it cannot be loaded, or takes or gives something else
            than images of 32x32x3 and the logits of 10 classes.
    """
    require_file(path)
    import keras

    import keras_bn  # noqa: F401 - its layer may be in the file

    try:
        network = keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise ExperimentError(f"{path} cannot be loaded: {reason}") from error
    shapes = network.input_shape, network.output_shape
    if shapes != ((None, 32, 32, 3), (None, 10)):
        raise ExperimentError(
            "the network must take images of 32x32x3 and give 10 numbers. "
            f"Received: model={path}, of shapes {shapes}"
        )
    return network


def require_same_data(facts: dict, dataset: data.Dataset) -> None:
    """Finds out whether a run was trained on this copy of the data.

    Raises:
        ExperimentError: it was not, so its inputs were scaled by others.
    """
    there = [facts.get(f"dataset{x}") for x in ("", "_version", "_copy")]
    here = [dataset.name, dataset.version, dataset.copy]
    if there != here:
        raise ExperimentError(
            f"the run was trained on {' '.join(map(str, there))}, and here is "
            f"{dataset.note}: give the data_dir of that copy"
        )


def publish(
    network: keras.Model, dataset: data.Dataset, input: str, output: Path
) -> Path:
    """Publishes a network, and prints what that came to.

    Args:
        network: from images, scaled as `input` says, to logits.
        dataset: what it was trained on.
        input: one of `data.INPUTS`.
        output: directory above the versions.

    Returns:
        Path of the version.

    Raises:
        ExperimentError: nothing was published, for the reason it says; or the
            published version cannot be run.
    """
    from keras_bn.serving import summary
    from keras_bn.serving.errors import ExportError
    from keras_bn.serving.export import export

    options = {"class_names": data.CLASS_NAMES[dataset.name]}
    if input == "standardized":
        options["preprocessing"] = data.moments(dataset.train_images)
    images = dataset.test_images[:IMAGES]
    try:
        exported = export(network, output, verify_on=images, **options)
        print(summary.published(exported), flush=True)
        print(summary.folding(exported, network, **options), flush=True)
    except (ExportError, ValueError, ImportError, OSError) as error:
        raise ExperimentError(" ".join(str(error).split())) from error
    return exported.path


def accuracies(
    network: keras.Model, dataset: data.Dataset, input: str
) -> dict[str, float]:
    """Returns the test accuracy of a network and of what is made of it.

    Args:
        network, dataset, input: as for `publish`.

    Returns:
        From "as trained", "folded", "folded, int8" (Keras's
        `quantize("int8")`) and "not folded, int8" to the accuracy, 0 to 1.
    """
    import keras

    import keras_bn

    def folded():
        try:
            return keras_bn.fold(network)
        except ValueError:
            # Nothing is normalized in it.
            return keras.models.clone_model(network)

    def copied():
        copy = keras.models.clone_model(network)
        copy.set_weights(network.get_weights())
        return copy

    prepare = data.inputs(dataset, input)
    found = {}
    for name, model in (
        ("as trained", copied()),
        ("folded", folded()),
        ("folded, int8", folded()),
        ("not folded, int8", copied()),
    ):
        if name.endswith("int8"):
            with warnings.catch_warnings():
                # Of each layer that keeps its weights, convolutions too.
                warnings.filterwarnings("ignore", ".*a `quantize` method")
                model.quantize("int8")
        right = 0
        for start in range(
            0, len(dataset.test_labels), evaluation.EVALUATION_BATCH
        ):
            rows = slice(start, start + evaluation.EVALUATION_BATCH)
            logits = model.predict_on_batch(prepare(dataset.test_images[rows]))
            right += np.sum(logits.argmax(-1) == dataset.test_labels[rows])
        found[name] = float(right / len(dataset.test_labels))
    return found


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string(
        "model", None, "A run's folder, RESULTS/CONDITION/SEED, or .keras file."
    )
    flags.DEFINE_string(
        "output", None, "Directory above the versions, new or with versions."
    )
    flags.DEFINE_enum(
        "input",
        None,
        data.INPUTS,
        "How training scaled the pixels; for a .keras file, as a run's folder "
        "says it.",
    )
    run_settings.define_data_flags()
    flags.adopt_module_key_flags(run_settings)


def main(argv):
    del argv
    model, output = flags.FLAGS.model, flags.FLAGS.output
    for name, value in (("model", model), ("output", output)):
        if not value:
            raise ExperimentError(f"give --{name}; --help says what it is")
    path, input = Path(model), flags.FLAGS.input
    is_file = path.suffix == ".keras"
    if is_file != (input is not None):
        raise ExperimentError(
            "--input is for a .keras file, and needed there. Received: "
            f"--model={model} --input={input}"
        )
    dataset_name, facts = flags.FLAGS.dataset, None
    atomic.check_folder(output)
    try:
        keras_bn_checks.check_destination(output, None)
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    if is_file:
        require_file(path)
    else:
        settings, facts = read_run(path)
        input, dataset_name = settings.input, facts["dataset"]
    data.check(dataset_name, flags.FLAGS.data_dir)
    require_backend()
    dataset = data.load(dataset_name, flags.FLAGS.data_dir)
    if facts:
        require_same_data(facts, dataset)
        network = load_run(path, settings)
        what = f"condition {settings.condition}, seed {settings.seed}, "
        what += f"{settings.steps:,} steps"
    else:
        network, what = load_file(path), str(path)
    print(f"{what}; {dataset.note}, {input} pixels -> {output}", flush=True)
    publish(network, dataset, input, Path(output))
    print("\ntest accuracy:")
    for name, accuracy in accuracies(network, dataset, input).items():
        print(f"  {name}: {accuracy:.4f}")


if __name__ == "__main__":
    define_flags()
    launch(main)

"""Results of studies that nobody ran."""

import dataclasses
import json

import numpy as np

from experiments.studies import records

_FACTS = {
    "dataset": "cifar10",
    "dataset_version": "3.0.2",
    "dataset_copy": "a test's copy",
    "backend": "tensorflow",
    "device": "CPU:0",
    "revision": "abc123",
}
# Of every measure that some study takes.
_MEASURES = (
    "accuracy_with_batch_statistics",
    "cpu_ms",
    "memory_mb",
    "recalibrated_test_accuracy",
    "shift",
    "training_accuracy_in_inference",
    "wall_ms",
)


def write(study, output, value, layer="keras_bn", **facts):
    """Writes a record for each run of a study.

    Args:
        study: the `Study`.
        output: folder of all results.
        value: called with the settings of a run, and a generator of its own;
            returns what all its measurements are.
        layer: whose batch normalization.
        **facts: other than those of `_FACTS`.
    """
    folder = study.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for settings in study.settings(quick=False, layer=layer):
        of_arm = map(ord, settings.arm)
        generator = np.random.default_rng([settings.seed, *of_arm])
        one = value(settings, generator)
        steps = np.linspace(1, settings.steps, 16).astype(int)
        # A loss that falls and then stays.
        loss = np.where(np.arange(16) < 4, 2.0, 1.2)
        constant = np.full(16, one)
        # What came before the last quarter counts for nothing.
        accuracy = np.where(np.arange(16) < 12, 0.1, one)
        columns = {
            "step": steps,
            "train_loss": loss,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "train_seconds": np.ones(16),
            "images_per_second": np.full(16, 1000.0),
            "shift_last": constant,
            "moved_first": np.linspace(0.1, 1.0, 16),
            "moved_last": np.linspace(0.1, 1.0, 16),
            "gradient_change": constant,
        }
        record = {
            "facts": {**dataclasses.asdict(settings), **_FACTS, **facts},
            "lines": {name: x.tolist() for name, x in columns.items()},
            "measures": dict.fromkeys(_MEASURES, one),
        }
        lines.append(json.dumps(record) + "\n")
    with open(folder / records.FILE, "a", encoding="utf-8") as file:
        file.write("".join(lines))

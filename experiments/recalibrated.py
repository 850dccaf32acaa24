"""What recalibration makes of a finished run, in `recalibrated.json`.

    images          training images, the first ones, that the new statistics
                    are of
    test_accuracy   of the trained weights with those statistics, 0 to 1
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

from experiments import article
from experiments import atomic
from experiments import data
from experiments import evaluation
from experiments import result_files
from experiments import run_folder
from experiments import run_model
from experiments.run_settings import Settings

# The training images that recalibration, and `keras_bn.audit`, are given.
IMAGES = 5_120


def write(
    settings: Settings, dataset: data.Dataset, folder: run_folder.RunFolder
) -> None:
    """Writes the file, if it is not there and can be.

    There is none of a condition without batch normalization, nor of a run
    whose weights were taken away, nor of one that diverged, which is said on
    stderr.

    Args:
        settings: of the run.
        dataset: what it was trained on.
        folder: the run's, which is trained.

    Raises:
        ExperimentError: a file cannot be read or written.
        OSError: the folder cannot be written to.
    """
    path = folder.path / result_files.RECALIBRATED
    bare = article.condition(settings.condition).batch_norm == "none"
    if bare or not folder.finished or path.exists():
        return
    if not os.access(folder.path, os.W_OK):
        return
    # Where another process is at it, it is not done twice.
    with contextlib.suppress(run_folder.BusyError), folder.locked():
        folder.remove_leftovers()
        if not path.exists():
            _recalibrate(settings, dataset, folder, path)


def _recalibrate(settings, dataset, folder, path):
    # Where nothing is normalized, keras_bn need not be importable.
    import keras_bn

    trained, model = run_model.network(settings), run_model.build(settings)
    folder.load_weights(trained)
    model.set_weights(trained.get_weights())
    prepare = data.inputs(dataset, settings.input)
    images = prepare(dataset.train_images[:IMAGES])
    try:
        keras_bn.recalibrate(model, images, verbose=0)
    except ValueError as error:
        # A run that diverged must not end the grid that it is part of.
        print(f"{folder.path}: not recalibrated: {error}", file=sys.stderr)
        return
    test = evaluation.evaluate(
        model, prepare(dataset.test_images), dataset.test_labels
    )
    values = {"images": len(images), "test_accuracy": test["accuracy"]}
    atomic.write_text(path, json.dumps(values) + "\n")

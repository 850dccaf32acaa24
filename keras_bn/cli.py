"""What the `keras-bn` command does, once its arguments are right.

`keras_bn_command` parses them, and prints the errors that are raised here.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import keras

import keras_bn
from keras_bn.cli_data import read

HEALTHY, FINDINGS = 0, 1


def audit(options):
    """Prints the report of a saved model; returns the exit code."""
    model = _load(options.model)
    report = keras_bn.audit(model, **_data(options, model))
    print(report.to_json() if options.json else report)
    return HEALTHY if report.ok else FINDINGS


def recalibrate(options):
    """Saves a model with new statistics; returns the exit code."""
    model = _load(options.model)
    done = keras_bn.recalibrate(
        model,
        method=options.method,
        force=options.force,
        **_data(options, model),
    )
    _save(model, Path(options.output))
    if options.json:
        print(json.dumps([asdict(one) for one in done], indent=2))
    else:
        print(done)
    return HEALTHY


def _data(options, model):
    """Arguments of `audit` and `recalibrate`."""
    if options.data is None:
        return {}
    data, labels = read(
        options.data, options.labels, model, options.batch_size
    )
    return {
        "data": data,
        "labels": labels,
        "steps": options.steps,
        "batch_size": options.batch_size,
        # The bar would be between the lines of a table or a document.
        "verbose": int(sys.stdout.isatty() and not options.json),
    }


def _load(path):
    try:
        return keras.saving.load_model(path)
    except Exception as error:
        # Keras raises many kinds, whatever is wrong with a file.
        unknown = re.search(
            r"Could not locate (?:class|function) '([^']+)'|(Lambda)",
            str(error),
        )
        if unknown:
            raise ValueError(
                "the model has code of your own. Received: "
                f"{path} with {unknown[1] or 'a Lambda layer'}. Load the model "
                "in Python and call keras_bn.audit or keras_bn.recalibrate"
            ) from error
        raise ValueError(
            f"Keras {keras.__version__} cannot load {path}: {error}"
        ) from error


def _save(model, path):
    """Saves beside `path` first: a file there is replaced as a whole."""
    path = path.absolute()
    handle, unfinished = tempfile.mkstemp(".keras", path.stem, path.parent)
    os.close(handle)
    try:
        model.save(unfinished, overwrite=True)
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask

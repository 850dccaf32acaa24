"""What the `keras-bn` command does, once its arguments are right.

`keras_bn_command` parses them, and prints the errors that are raised here.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import keras

import keras_bn
from keras_bn import cli_measures
from keras_bn.cli_data import first_batch
from keras_bn.cli_data import read
from keras_bn.model_layers import BATCH_NORMALIZATIONS
from keras_bn.serving import summary
from keras_bn.serving.errors import ExportError
from keras_bn.serving.export import export as export_model
from keras_bn.surgery.tf_keras_models import from_tf_keras
from keras_bn.surgery.tf_keras_models import is_tf_keras_file
from keras_bn_checks import json_member
from keras_bn_checks import printable

HEALTHY, FINDINGS = 0, 1
# What `convert --to` names; the others are names in Python too.
_LAYERS = {
    "keras_bn": keras_bn.BatchNormalization,
    "keras": keras.layers.BatchNormalization,
}
# As many samples of --data are enough for checks and warm-up requests.
_SAMPLES = 32


def audit(options):
    """Prints the report of a saved model; returns the exit code."""
    with _warnings_in_one_line():
        model = _load(options.model)
        report = keras_bn.audit(model, **_data(options, model))
    print(report.to_json() if options.json else report)
    return HEALTHY if report.ok else FINDINGS


def recalibrate(options):
    """Saves a model with new statistics; returns the exit code."""
    with _warnings_in_one_line():
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


def convert(options):
    """Saves a model with another layer for batch normalization."""
    to = _LAYERS.get(options.to, options.to)
    of_tf_keras = is_tf_keras_file(options.model)
    before = (from_tf_keras if of_tf_keras else _load)(options.model)
    with _warnings_in_one_line():
        after = keras_bn.convert(before, to)
    converted = [
        layer
        for layer in before._flatten_layers()
        if isinstance(layer, BATCH_NORMALIZATIONS)
        and (of_tf_keras or type(layer) is not to)
    ]
    # Other layers are not meant to give the same outputs.
    checked = ""
    if options.to in _LAYERS:
        checked = cli_measures.check(before, after)
    _save_new(after, options)
    print(f"converted {len(converted)} batch normalizations to {options.to}")
    if checked:
        print(checked)
    print()
    print(cli_measures.latencies(before, after))
    return HEALTHY


def fold(options):
    """Saves a model without batch normalization, for inference."""
    before = _load(options.model)
    after = keras_bn.fold(before)
    report = after.fold_report
    checked = cli_measures.check(before, after)
    _save_new(after, options)
    print(f"folded {len(report.folded)} of {len(report)} batch normalizations")
    print(checked)
    print()
    print(report)
    print()
    print(cli_measures.latencies(before, after))
    return HEALTHY


def export(options):
    """Publishes a SavedModel as a new version in a directory."""
    model = _load(options.model)
    arguments = {"class_names": options.class_names}
    if options.mean is not None:
        arguments["preprocessing"] = (options.mean, options.deviation)
    samples = None
    if options.data is not None:
        data, _ = read(options.data, None, model, _SAMPLES)
        samples = first_batch(data, _SAMPLES)
    try:
        with _warnings_in_one_line():
            exported = export_model(
                model, options.output, verify_on=samples, **arguments
            )
        print(summary.published(exported), flush=True)
        print(summary.folding(exported, model, **arguments))
    except ExportError as error:
        raise ValueError(str(error)) from error
    return HEALTHY


@contextlib.contextmanager
def _warnings_in_one_line():
    """Users of a command do not want to know the line of the program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for one in caught:
        if issubclass(one.category, UserWarning):
            message = printable(str(one.message))
            print(f"keras-bn: warning: {message}", file=sys.stderr)


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
    if is_tf_keras_file(path):
        raise ValueError(
            f"the model was saved by tf-keras (Keras 2). Received: {path}. "
            f"`keras-bn convert {path} --output NEW.keras` makes one of Keras "
            "3 of it"
        )
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
                "in Python and call the function of keras_bn there"
            ) from error
        # It repeats the config before it comes to the point.
        reason = str(error).split("Exception encountered:")[-1]
        raise ValueError(
            f"Keras {keras.__version__} cannot load {path}"
            f"{_saved_by_another_version(path)}: {reason}"
        ) from error


def _saved_by_another_version(path):
    try:
        version = json_member(path, "metadata.json")["keras_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return (
        "" if version == keras.__version__ else f", saved by Keras {version}"
    )


def _save_new(model, options):
    path = Path(options.output)
    _save(model, path, new=True)
    print(
        f"wrote {path}: {summary.megabytes(path)} ({options.model}: "
        f"{summary.megabytes(options.model)})"
    )


def _save(model, path, new=False):
    """Saves beside `path` first: a file there is replaced as a whole.

    With `new` there must be none.
    """
    path = path.absolute()
    handle, unfinished = tempfile.mkstemp(".keras", path.stem, path.parent)
    os.close(handle)
    try:
        try:
            model.save(unfinished, overwrite=True)
        except Exception as error:
            # HDF5 has kinds of its own, for a full disk too.
            raise ValueError(
                f"the model cannot be saved: {error}. Received: --output={path}"
                ". Nothing was written"
            ) from error
        if new and os.path.lexists(path):
            raise ValueError(f"something is there. Received: --output={path}")
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask

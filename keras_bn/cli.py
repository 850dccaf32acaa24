"""The `keras-bn` command: what the package does to a saved model.

    keras-bn audit MODEL.keras --data cifar10:test
    keras-bn recalibrate MODEL.keras --data images.npz --output MENDED.keras

It ends with 0 where the model is healthy, or was recalibrated, with 1 where
`audit` found something or the model was never trained, and with 2 where it
cannot be told, in one line.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

HEALTHY, FINDINGS, BAD_INPUT = 0, 1, 2


class CommandError(Exception):
    """What the command cannot do; its message is the sentence that says so."""


def main(arguments=None):
    """Runs the command, and returns its exit code.

    Args:
        arguments: List of str; None: those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("keras-bn: interrupted", file=sys.stderr)
        return 130
    except (CommandError, ValueError, OSError, ImportError) as error:
        print(f"keras-bn: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-bn",
        description="Finds and mends batch normalization in a saved model.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    audit = commands.add_parser(
        "audit",
        help="say whether the statistics are right: exit code 0, else 1",
    )
    audit.set_defaults(run=_audit)
    _add_model_and_data(audit, required=False)
    recalibrate = commands.add_parser(
        "recalibrate", help="compute the moving statistics anew from data"
    )
    recalibrate.set_defaults(run=_recalibrate)
    _add_model_and_data(recalibrate, required=True)
    recalibrate.add_argument(
        "--output",
        required=True,
        metavar="FILE.keras",
        help="where the model is saved with its new statistics",
    )
    recalibrate.add_argument(
        "--method",
        choices=("batch", "layerwise"),
        default="batch",
        help="one pass over the data, or one for each layer",
    )
    recalibrate.add_argument(
        "--force",
        action="store_true",
        help="also where the labels say that the old statistics are right",
    )
    return parser


def _add_model_and_data(parser, required):
    parser.add_argument("model", metavar="MODEL.keras", help="a saved model")
    parser.add_argument(
        "--data",
        required=required,
        metavar="DATA",
        help="an .npz file of arrays x and y, or of the model's inputs by "
        "name; a folder of images, with a folder for each class; or NAME or "
        "NAME:SPLIT of TensorFlow Datasets (split train by default)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE.npy",
        help="labels of the samples of an .npz file, where it has no y",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="batches to read (default: all)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=128, metavar="N", help="default: 128"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )


def _audit(options):
    from keras_bn.diagnostics.audit import audit

    model = _load(options.model)
    report = audit(model, **_data(options, model))
    print(report.to_json() if options.json else report)
    return HEALTHY if report.ok else FINDINGS


def _recalibrate(options):
    from keras_bn.diagnostics.recalibrate import recalibrate

    _check_output(options.output)
    model = _load(options.model)
    done = recalibrate(
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
    if options.steps is not None and options.steps < 1:
        raise CommandError(
            "--steps must be at least 1. Received: "
            f"--steps={options.steps}. Leave it out to read everything"
        )
    if options.batch_size < 1:
        raise CommandError(
            "--batch_size must be at least 1. Received: "
            f"--batch_size={options.batch_size}. Give a larger one"
        )
    if options.data is None:
        if options.labels:
            raise CommandError(
                f"--labels belong to data. Received: --labels={options.labels}"
                ". Give --data as well"
            )
        return {}
    from keras_bn.cli_data import read

    data, labels = read(
        options.data, options.labels, model, options.batch_size
    )
    return {
        "data": data,
        "labels": labels,
        "steps": options.steps,
        "batch_size": options.batch_size,
        # The bar would be between the lines of a table or a document.
        "verbose": int(sys.stderr.isatty() and not options.json),
    }


def _load(path):
    if not os.path.isfile(path):
        raise CommandError(
            f"no such file. Received: {path}. Give a .keras file"
        )
    if not path.endswith(".keras"):
        raise CommandError(
            f"the model must be a .keras file. Received: {path}. "
            "Save it with model.save(...)"
        )
    if not zipfile.is_zipfile(path):
        raise CommandError(
            f"the file is damaged, or no model of Keras 3. Received: {path}. "
            "Save the model again with model.save(...)"
        )
    import keras

    import keras_bn  # noqa: F401  # its layers can be loaded then

    try:
        return keras.saving.load_model(path)
    except Exception as error:
        # Keras raises many kinds, whatever is wrong with a file.
        unknown = re.search("Could not locate class '([^']+)'", str(error))
        if unknown:
            raise CommandError(
                f"the model has a layer of your own. Received: {path} with "
                f"{unknown[1]}. Import it in Python, load the model and call "
                "keras_bn.audit or keras_bn.recalibrate"
            ) from error
        raise CommandError(
            f"Keras {keras.__version__} cannot load {path}: {_one_line(error)}"
        ) from error


def _check_output(path):
    if not path.endswith(".keras"):
        raise CommandError(
            f"the output must end in .keras. Received: --output={path}"
        )
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CommandError(
            f"cannot write there. Received: --output={path}. Name a file in a "
            "folder that exists"
        )


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


def _one_line(error):
    text = str(error)
    if "in user code:" in text:
        # TensorFlow's traceback through a graph; the error is its last part.
        text = re.split(r"\n\s*\w*Error: ", text)[-1]
    return " ".join(text.split())[:500].rstrip(".")

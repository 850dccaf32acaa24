"""The `keras-bn` command: its arguments, its errors and its exit code.

    keras-bn audit MODEL.keras --data cifar10:test
    keras-bn recalibrate MODEL.keras --data images.npz --output MENDED.keras

It ends with 0 where the model is healthy, or was recalibrated, with 1 where
`audit` found something or the model was never trained, and with 2 where it
cannot be told, in one line.

This module is no part of the package `keras_bn`, whose import is that of Keras
and of a framework: help and wrong arguments need neither.
"""

import argparse
import contextlib
import os
import re
import sys
import zipfile
from pathlib import Path

BAD_INPUT = 2


def main(arguments=None):
    """Runs the command, and returns its exit code.

    Args:
        arguments: List of str; None: those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        with _start_up_lines_dropped():
            from keras_bn import cli

        return getattr(cli, options.command)(options)
    except KeyboardInterrupt:
        print("keras-bn: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
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
    audit.set_defaults(command="audit")
    _add_model_and_data(audit, required=False)
    recalibrate = commands.add_parser(
        "recalibrate", help="compute the moving statistics anew from data"
    )
    recalibrate.set_defaults(command="recalibrate")
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


@contextlib.contextmanager
def _start_up_lines_dropped():
    """What native code writes to stderr goes nowhere.

    TensorFlow 2.21 says what it found whatever TF_CPP_MIN_LOG_LEVEL is; this
    is for what it says later.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check(options):
    if options.steps is not None and options.steps < 1:
        raise ValueError(
            "--steps must be at least 1. Received: "
            f"--steps={options.steps}. Leave it out to read everything"
        )
    if options.batch_size < 1:
        raise ValueError(
            "--batch_size must be at least 1. Received: "
            f"--batch_size={options.batch_size}. Give a larger one"
        )
    if options.data is None and options.labels:
        raise ValueError(
            f"--labels belong to data. Received: --labels={options.labels}"
            ". Give --data as well"
        )
    _check_model(options.model)
    if options.command == "recalibrate":
        _check_output(options.output)


def _check_model(path):
    if not os.path.isfile(path):
        raise ValueError(f"no such file. Received: {path}. Give a .keras file")
    if not path.endswith(".keras"):
        raise ValueError(
            f"the model must be a .keras file. Received: {path}. "
            "Save it with model.save(...)"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"the file is damaged, or no model of Keras 3. Received: {path}. "
            "Save the model again with model.save(...)"
        )


def _check_output(path):
    if not path.endswith(".keras"):
        raise ValueError(
            f"the output must end in .keras. Received: --output={path}"
        )
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"cannot write there. Received: --output={path}. Name a file in a "
            "folder that exists"
        )


def _one_line(error):
    # Keras has words in bold.
    text = re.sub("\x1b\\[\\d+m", "", str(error))
    return " ".join(text.split())[:500].rstrip(".")

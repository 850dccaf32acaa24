"""The `keras-bn` command: its arguments, its errors and its exit code.

    keras-bn audit MODEL.keras --data cifar10:test
    keras-bn recalibrate MODEL.keras --data images.npz --output MENDED.keras
    keras-bn convert MODEL.keras --to keras_bn --output CONVERTED.keras
    keras-bn fold MODEL.keras --output FOLDED.keras
    keras-bn export MODEL.keras --output DIRECTORY

It ends with 0 where the model is healthy, or what was asked for is written,
with 1 where `audit` found something or the model was never trained, and with 2
where that cannot be done, in one line. With KERAS_BN_TRACEBACK=1 in the
environment the traceback comes before the line.

This module is no part of the package `keras_bn`, whose import is that of Keras
and of a framework: help and wrong arguments need neither.
"""

import argparse
import contextlib
import math
import os
import re
import sys
import traceback
from pathlib import Path

import keras_bn_checks

BAD_INPUT = 2


def main(arguments=None):
    """Runs the command, and returns its exit code.

    Args:
        arguments: List of str; None: those of the process.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A name that a terminal's encoding lacks; None without a terminal.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check(options)
        with tensorflow_imported_quietly():
            from keras_bn import cli

            return getattr(cli, options.command)(options)
    except KeyboardInterrupt:
        print("keras-bn: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # 1 would mean findings.
        if os.environ.get("KERAS_BN_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        text = _one_line(error)
        if not isinstance(error, (ValueError, OSError, ImportError)):
            text = f"{type(error).__name__}: {text}"
        print(f"keras-bn: error: {text}", file=sys.stderr)
        return BAD_INPUT


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        text = f"{_one_line(message)}. See `{self.prog} --help`"
        self.exit(BAD_INPUT, f"keras-bn: error: {text}\n")


def _parser():
    parser = _Parser(
        prog="keras-bn",
        description="Finds, mends, converts and folds batch normalization in "
        "a saved model, and exports it to be served.",
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
    _add_convert(commands)
    _add_fold(commands)
    _add_export(commands)
    return parser


def _add_convert(commands):
    convert = commands.add_parser(
        "convert", help="put another layer in place of batch normalization"
    )
    convert.set_defaults(command="convert")
    convert.add_argument(
        "model",
        metavar="MODEL",
        help="a .keras file, or an .h5 or .keras file of tf-keras",
    )
    convert.add_argument(
        "--to",
        choices=("keras_bn", "keras", "group", "layer", "instance"),
        default="keras_bn",
        help="keras_bn.BatchNormalization (default), Keras's own, or Keras's "
        "group, layer or instance normalization",
    )
    _add_new_file(convert)


def _add_fold(commands):
    fold = commands.add_parser(
        "fold", help="take batch normalization out, for inference"
    )
    fold.set_defaults(command="fold")
    _add_model(fold)
    _add_new_file(fold)


def _add_export(commands):
    export = commands.add_parser(
        "export", help="publish a SavedModel that model servers load"
    )
    export.set_defaults(command="export")
    _add_model(export)
    export.add_argument(
        "--output",
        required=True,
        metavar="DIRECTORY",
        help="of the model, above its numbered versions; new or empty, or "
        "with versions, beside which the next one is put",
    )
    export.add_argument(
        "--class_names",
        metavar="FILE",
        help="text file with the classes' names in the model's order, one a "
        "line; adds the signature classify_bytes",
    )
    for name, what in (
        ("mean", "what training subtracted from the pixels"),
        ("deviation", "what it divided them by then"),
    ):
        export.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="NUMBERS",
            help=f"{what}: a number, or one for each channel with commas "
            "between",
        )
    export.add_argument(
        "--data",
        metavar="DATA",
        help="samples as clients will send them, for the check and warm-up "
        "requests: as for audit (default: random ones)",
    )


def _numbers(text):
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number, or several with commas between: {text!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _add_new_file(parser):
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.keras",
        help="where the new model is saved; nothing may be there yet",
    )


def _add_model(parser):
    parser.add_argument("model", metavar="MODEL.keras", help="a saved model")


def _add_model_and_data(parser, required):
    _add_model(parser)
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
def tensorflow_imported_quietly():
    """What TensorFlow 2.21 says of the machine when it is imported is dropped.

    It says that whatever TF_CPP_MIN_LOG_LEVEL is, which is for what comes
    later. Keras imports TensorFlow on other backends too, at any time. A user
    who sets the level to 0 or 1 sees all.
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    finder = _QuietTensorFlow()
    if level not in ("0", "1"):
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)


class _QuietTensorFlow:
    """A finder of TensorFlow alone, which drops what its import prints."""

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((x for x in specs if x is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_quietly(module):
                with _native_lines_dropped():
                    execute(module)

            spec.loader.exec_module = execute_quietly
        return spec


@contextlib.contextmanager
def _native_lines_dropped():
    """What native code writes to stderr goes nowhere."""
    if sys.stderr is None:
        # This process was started without one.
        yield
        return
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
    """Refuses what needs no Keras to be found wrong.

    Raises:
        ValueError, OSError: A flag, a path or a file is.
    """
    if options.command in ("audit", "recalibrate"):
        _check_data(options)
    if getattr(options, "data", None) is not None:
        keras_bn_checks.check_data(
            options.data, getattr(options, "labels", None)
        )
    endings = (".keras", ".h5") if options.command == "convert" else (".keras",)
    config = _check_model(options.model, endings)
    if options.command in ("recalibrate", "convert", "fold"):
        _check_output(options.output, new=options.command != "recalibrate")
    if options.command == "export":
        _check_export(options, keras_bn_checks.number_of_outputs(config))


def _check_export(options, outputs):
    _check_scaling(options.mean, options.deviation)
    keras_bn_checks.check_destination(options.output, None)
    keras_bn_checks.check_writable(
        options.output, f"--output={options.output}"
    )
    if options.class_names is None:
        return
    options.class_names = keras_bn_checks.class_names(options.class_names)
    if outputs not in (None, len(options.class_names)):
        raise ValueError(
            f"the classes must have a name for each of {outputs} outputs of "
            f"the model. Received: {len(options.class_names)} names"
        )


def _check_scaling(mean, deviation):
    if (mean is None) != (deviation is None):
        raise ValueError(
            "--mean and --deviation go together. Received: "
            f"--mean={mean}, --deviation={deviation}"
        )
    if mean is None:
        return
    means, deviations = (
        x if isinstance(x, list) else [x] for x in (mean, deviation)
    )
    if not all(map(math.isfinite, means + deviations)) or min(deviations) <= 0:
        raise ValueError(
            "--mean and --deviation must be finite, and the deviation above "
            f"zero. Received: --mean={mean}, --deviation={deviation}"
        )


def _check_data(options):
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


def _check_model(path, endings):
    if not os.path.isfile(path):
        raise ValueError(f"no such file. Received: {path}. Give a .keras file")
    if not path.endswith(endings):
        raise ValueError(
            f"the model must be a {' or '.join(endings)} file. Received: "
            f"{path}. Save it with model.save(...); `keras-bn convert` also "
            "reads .h5 files"
        )
    if path.endswith(".keras"):
        return keras_bn_checks.json_member(path, "config.json")
    if not keras_bn_checks.is_hdf5(path):
        raise ValueError(
            f"the file is damaged, or no .h5 file. Received: {path}"
        )
    return None


def _check_output(path, new):
    if not path.endswith(".keras"):
        raise ValueError(
            f"the output must end in .keras. Received: --output={path}"
        )
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(
            f"cannot write there. Received: --output={path}. Name a file in a "
            "folder that exists"
        )
    keras_bn_checks.check_writable(folder, f"--output={path}")
    if os.path.isdir(path) or (new and os.path.lexists(path)):
        raise ValueError(
            f"something is there already. Received: --output={path}. Remove "
            "it, or name another file"
        )
    if os.path.isdir(path):
        raise ValueError(
            f"a folder is there. Received: --output={path}. Name a file"
        )


def _one_line(error):
    # Keras has words in bold.
    text = re.sub("\x1b\\[\\d+m", "", str(error))
    text = " ".join(text.split())[:500].rstrip(".")
    return keras_bn_checks.printable(text)

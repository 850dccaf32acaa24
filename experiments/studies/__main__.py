"""Measures what the articles claim about batch normalization.

    python -m experiments.studies learning_rate
    python -m experiments.studies all --quick

Each study trains small networks, on two cores in 20 minutes or less, and adds
its runs to ``OUTPUT/studies/NAME/runs.jsonl``. Finished runs are not trained
again, an interrupted one goes on. The report, with a chapter for each study
and a table of all claims, is written at the end.
"""

import logging
import time
from pathlib import Path

from absl import flags

from experiments import ExperimentError
from experiments import atomic
from experiments import data
from experiments import launch
from experiments import models
from experiments import report
from experiments import require_backend
from experiments import run_settings
from experiments import studies
from experiments.studies.settings import shrink


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_bool(
        "quick",
        False,
        "Train for seconds alone: to see it work, not to learn from it.",
    )
    flags.DEFINE_enum(
        "layer",
        "keras_bn",
        models.LAYERS,
        "Whose BatchNormalization to train with. keras: what has batch "
        "normalization is trained once more with Keras's, as a check.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "Folder of all results (default: results, with --quick "
        "results/quick).",
    )
    run_settings.define_data_flags()
    flags.adopt_module_key_flags(run_settings)


def names(arguments: list[str]) -> list[str]:
    """Returns the studies that a command line asks for.

    Raises:
        ExperimentError: it names none, or one that does not exist.
    """
    if arguments == ["all"]:
        return list(studies.NAMES)
    if not arguments or not set(arguments) <= set(studies.NAMES):
        raise ExperimentError(
            f"name studies: all, or any of {', '.join(studies.NAMES)}. "
            f"Received: {' '.join(arguments) or 'none'}"
        )
    return arguments


def main(argv):
    chosen = [studies.find(name) for name in names(argv[1:])]
    # A study makes many models; TensorFlow warns that it traces them all.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    quick, layer = flags.FLAGS.quick, flags.FLAGS.layer
    output = flags.FLAGS.output
    if output is None:
        output = "results/quick" if quick else "results"
    atomic.check_folder(output)
    atomic.check_writable(Path(output) / "report.html")
    data.check(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    require_backend()
    dataset = data.load(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    dataset = shrink(dataset)
    print(dataset.note, flush=True)
    for study in chosen:
        began = time.monotonic()
        study.run(dataset, output, quick, layer)
        results = study.read(output)
        seconds = time.monotonic() - began
        print(f"{study.name}: {results.verdict} ({seconds:.0f} s)")
        for answer in results.answers_of_keras or results.answers:
            print(f"  {answer.sentence}", flush=True)
    print(f"report: {report.write_report(output)}")


if __name__ == "__main__":
    define_flags()
    launch(main, takes_arguments=True)

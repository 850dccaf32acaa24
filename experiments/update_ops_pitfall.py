"""Shows what becomes of a network whose moving statistics were not updated.

    python -m experiments.update_ops_pitfall --forms=a,b

The article's TensorFlow 1 program needs two lines for `UPDATE_OPS`, without
which the moving statistics keep their initial values. Here that mistake, and
those that have its effect today, are each trained wrongly and rightly on the
same data: `experiments.pitfall_arms` lists them. Each trained network is
tested, shown to `keras_bn.audit`, recalibrated and tested again.

The folder OUTPUT has

    run.json             what made the results: settings, data, versions
    results.jsonl        a line for each arm that is done: test accuracy before
                         and after `recalibrate`, what the moving statistics
                         span, what `audit` and `recalibrate` said, versions
    headline.jsonl       test accuracy over the steps of arm e_enough, with
                         moving and with recalibrated statistics
    headline.svg, .png   that curve
    forms.svg, .png      all arms
    models/              the trained networks; an arm's is there once it is
                         trained, and is not trained again

No time or date is in the JSON. After an interruption the same command goes on
with the arm that was cut short.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import ExperimentError
from experiments import atomic
from experiments import child_process
from experiments import data
from experiments import launch
from experiments import pitfall_arms
from experiments import pitfall_child
from experiments import pitfall_figures
from experiments import progress
from experiments import raise_if_interrupted
from experiments import require_backend
from experiments import result_files
from experiments import run_settings
from experiments import same_settings
from experiments import train
from experiments.pitfall_arms import Arm
from experiments.pitfall_arms import Form
from experiments.run_settings import Settings

_RESULTS = "results.jsonl"


def open_folder(facts: dict, output: Path) -> list[dict]:
    """Begins the results, or reads those that are there.

    Args:
        facts: what makes these results, from `train.describe`.
        output: folder of the results.

    Returns:
        The lines of results.jsonl.

    Raises:
        ExperimentError: the folder has results of other settings, or damaged
            ones, or cannot be written to.
    """
    path, results = output / "run.json", output / _RESULTS
    if os.path.exists(path):
        there = result_files.read_facts(path)
        same_settings.require_settings(output, there, facts)
        return _read_lines(results, {"arm"}) if os.path.exists(results) else []
    if os.path.exists(results) or os.path.exists(output / "models"):
        raise ExperimentError(
            f"{output} has results but no run.json that says what made them: "
            "give another output, or delete the folder"
        )
    atomic.write_text(path, json.dumps(facts, indent=2) + "\n")
    return []


def run(
    forms: list[Form],
    settings: Settings,
    dataset: data.Dataset,
    output: Path,
) -> list[dict]:
    """Trains and examines what is left to do.

    Args:
        forms: those that can be trained here.
        settings: of every training but that of few steps.
        dataset: what to train on.
        output: folder of the results.

    Returns:
        The lines of results.jsonl for these forms, in order.

    Raises:
        ExperimentError: as `open_folder`; or a process failed.
        KeyboardInterrupt: the program was told to stop; it says how to go on.
    """
    import keras

    lines = open_folder(train.describe(settings, dataset), output)
    done = {line["arm"]: line for line in lines}
    arms = [arm for form in forms for arm in form.arms if arm.name not in done]
    groups = _groups(arms, output, keras.backend.backend())
    trained = [arm for arm in arms if _is_trained(arm, output)]
    words = "before the first arm"

    def on_answer(answer: dict) -> None:
        nonlocal words
        raise_if_interrupted()
        bar.update(answer.get("step", 0))
        if "arm" in answer:
            arm = pitfall_arms.ARMS[answer["arm"]]
            words = f"form {arm.form}, {arm.title}"
            bar.set_description(words)
        if "facts" in answer:
            facts = answer["facts"]
            done[facts["arm"]] = facts
            in_order = [done[x] for x in pitfall_arms.ARMS if x in done]
            text = "".join(json.dumps(line) + "\n" for line in in_order)
            atomic.write_text(output / _RESULTS, text)

    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            progress.bar(
                "starting",
                _steps(arms, settings),
                " steps",
                initial=_steps(trained, settings),
            ) as bar,
        ):
            if arms:
                pitfall_child.write_images(dataset, Path(folder))
            for framework, group in groups.items():
                _ask(framework, group, settings, folder, output, on_answer)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped ({words}); the same command goes on with this arm"
        ) from None
    return [done[arm.name] for form in forms for arm in form.arms]


def _groups(arms, output, backend) -> dict[str, list[Arm]]:
    """From each process that is needed to its arms, in order."""
    groups = {}
    of_session = [arm for arm in arms if arm.form == "a"]
    missing = [arm for arm in of_session if not _is_trained(arm, output)]
    if missing:
        groups["tensorflow1"] = missing
    for arm in arms:
        framework = pitfall_arms.FORMS[arm.form].framework or backend
        if framework == "tensorflow1":
            # Another Keras trained it; this one examines it.
            framework = "tensorflow"
        groups.setdefault(framework, []).append(arm)
    return groups


def _is_trained(arm, output):
    if arm.form == "a":
        return os.path.exists(pitfall_child.variables_path(output, arm))
    return os.path.exists(pitfall_child.model_path(output, arm))


def _steps(arms, settings):
    return sum(
        pitfall_arms.training_steps(name, settings.steps)
        for name in {arm.trained_as for arm in arms}
    )


def _ask(framework, arms, settings, folder, output, on_answer):
    environment = {"KERAS_BACKEND": framework}
    if framework == "tensorflow1":
        environment = {
            "KERAS_BACKEND": "tensorflow",
            "TF_USE_LEGACY_KERAS": "1",
        }
    request = {
        "framework": framework,
        "arms": [arm.name for arm in arms],
        "settings": dataclasses.asdict(settings),
        "folder": folder,
        "output": os.path.abspath(output),
    }
    try:
        child_process.ask(
            "experiments.pitfall_child", request, environment, on_answer
        )
    except child_process.ChildError as error:
        raise ExperimentError(
            f"the process of {framework} failed: {error}"
        ) from error


def table(lines: list[dict]) -> Table:
    """Returns the arms as a table for the terminal.

    Args:
        lines: what `run` returns.
    """
    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    printed.add_column("form")
    printed.add_column("arm")
    printed.add_column("test accuracy", justify="right")
    printed.add_column("recalibrated", justify="right")
    printed.add_column("audit, no data")
    printed.add_column("audit, data and labels: remedy")
    for line in lines:
        recalibrated = f"{line['test_accuracy_recalibrated']:.3f}"
        if line["refusal"]:
            recalibrated = f"refused; forced: {recalibrated}"
        printed.add_row(
            line["form"],
            ("" if line["right"] else "WRONG: ") + line["title"],
            f"{line['test_accuracy']:.3f}",
            recalibrated,
            _words(line["audit"]["without_data"], "what"),
            _words(line["audit"]["with_data"], "remedy"),
        )
    return printed


def _words(report, name):
    words = [finding[name] for finding in report["findings"]]
    return "; ".join(dict.fromkeys(words)) or report["status"]


def _read_lines(path: Path, names: set[str]) -> list[dict]:
    lines = []
    try:
        for number, text in enumerate(
            path.read_text(encoding="utf-8").splitlines(), start=1
        ):
            line = json.loads(text)
            if not names <= line.keys():
                raise ValueError
            lines.append(line)
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}"
        ) from error
    except (ValueError, AttributeError) as error:
        raise ExperimentError(
            f"{path}, line {number}: damaged; delete that line, or the folder"
        ) from error
    return lines


def _split(forms: list[Form]) -> tuple[list[Form], list[str]]:
    """Returns the forms that can be trained, and a line for each other."""
    possible, left_out = [], []
    for form in forms:
        missing = [name.replace("_", "-") for name in form.missing()]
        if missing:
            left_out.append(
                f"left out: form {form.letter} ({form.title}) needs "
                f"{' and '.join(missing)}, not installed here"
            )
        else:
            possible.append(form)
    if not possible:
        raise ExperimentError("; ".join(left_out))
    return possible, left_out


def define_flags() -> None:
    """Defines this program's flags."""
    titles = "; ".join(
        f"{form.letter}: {form.title}" for form in pitfall_arms.FORMS.values()
    )
    flags.DEFINE_list(
        "forms",
        list(pitfall_arms.FORMS),
        f"Letters of the forms to show; {titles}.",
    )
    flags.DEFINE_integer(
        "steps",
        800,
        f"Training steps of each arm; form e's wrong one has "
        f"{pitfall_arms.FEW_STEPS}.",
    )
    flags.DEFINE_integer(
        "eval_every", 50, "Training steps between points of the headline curve."
    )
    flags.DEFINE_string(
        "output", "results/update_ops_pitfall", "Folder of the results."
    )
    run_settings.define_data_flags()
    flags.adopt_module_key_flags(run_settings)


def main(argv):
    del argv
    forms, left_out = _split(pitfall_arms.parse(flags.FLAGS.forms))
    settings = Settings(pitfall_arms.CONDITION, **run_settings.given())
    if not flags.FLAGS.output:
        raise ExperimentError(
            "output is the folder of the results. Received: an empty one"
        )
    output = Path(flags.FLAGS.output)
    atomic.check_folder(output)
    data.check(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    require_backend()
    dataset = data.load(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    print(f"{dataset.note}, {settings.steps:,} steps -> {output}", flush=True)
    for line in left_out:
        print(line, flush=True)
    lines = run(forms, settings, dataset, output)
    Console().print(table(lines))
    paths = pitfall_figures.draw_forms(
        lines, settings.steps, dataset.name, output
    )
    if any(form.letter in "ef" for form in forms):
        curve = _read_lines(
            output / pitfall_child.CURVE,
            {"step", "test_accuracy", "test_accuracy_recalibrated"},
        )
        paths += pitfall_figures.draw_headline(curve, dataset.name, output)
    print(f"figures: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    define_flags()
    launch(main)

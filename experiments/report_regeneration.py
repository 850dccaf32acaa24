"""What made the results of a report, and how to make them once more."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence

from experiments import control_results
from experiments import controls
from experiments import machine
from experiments import same_settings
from experiments.report_html import commands
from experiments.report_html import escape
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_summaries import Contents
from experiments.report_summaries import data_of
from experiments.result_files import Run
from experiments.run_settings import Settings

# Those of `train` and `reproduce` alike that take a value.
_FLAGS = (
    "steps",
    "eval_every",
    "batch_size",
    "optimizer",
    "learning_rate",
    "input",
    "layer",
    "placement",
)


def settings_of(
    runs: Sequence[Run], title: str = "What made these results"
) -> str:
    """The section on what made the results.

    Args:
        runs: at least one.
        title: of the section.
    """
    data = dict.fromkeys(data_of(run.facts) for run in runs)
    facts = {"data": "; ".join(data)}
    for name in same_settings.SETTINGS + same_settings.CIRCUMSTANCES:
        if not name.startswith("dataset"):
            values = [run.facts.get(name) for run in runs]
            text = same_settings.describe(values[0])
            if name in same_settings.SETTINGS and any(
                value != values[0] for value in values
            ):
                text = "not the same in all"
            facts[name.replace("_", " ")] = text
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    notes = same_settings.differing_circumstances(runs)
    return section(
        title,
        '<div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(title)}"><table class="settings"><caption>'
        "Settings, hardware and software of the runs; as the first of them "
        "has them where a note below says that they differ.</caption>\n"
        f"{rows}\n"
        "</table></div>",
        paragraphs(notes, "note"),
    )


def regenerate(contents: Contents) -> str:
    """The commands that make the results, and the page, once more."""
    facts = contents.runs[0].facts
    launch, variables, explained = _launch(facts)
    lengths = sorted({run.facts["steps"] for run in contents.runs})
    train = [*launch, "-m", "experiments.train"]
    train += ["--condition=N", "--seed=N", "--output=RESULTS"]
    for name in ("dataset", *_FLAGS, "distribution"):
        if name == "steps" and len(lengths) > 1:
            train.append("--steps=STEPS")
            explained.append(
                "STEPS is the run's own: "
                f"{' or '.join(f'{x:,}' for x in lengths)}."
            )
        elif name in facts:
            train.append(f"--{name}={facts[name]}")
    if facts.get("shuffle"):
        train.append("--shuffle")
    if facts["synchronized"]:
        train.append("--synchronized")
    if "cpu" in facts.get("device", "").lower() and facts["replicas"] > 1:
        if facts["distribution"] in ("mirrored", "data_parallel"):
            train.append(f"--cpu_devices={facts['replicas']}")
    report = ["python", "-m", "experiments.report", "--results=RESULTS"]
    if contents.curves is not None:
        report.append("--published_curves=CSV")
    prefix = _backend(facts) + variables
    lines = f"{prefix}{shlex.join(train)}\n{shlex.join(report)}"
    return (
        paragraphs(
            [
                "With RESULTS the folder of this report: each run, whose "
                "condition and seed are above, from a clone of the repository "
                "at the run's revision; then the page, from one at "
                f"revision {machine.revision()}.",
                *explained,
            ]
        )
        + "\n"
        + commands(lines, "Commands that make this report again")
    )


def regenerate_control(results: control_results.Results) -> str:
    """The command that makes the runs of a control experiment once more."""
    control = results.control
    runs = [run for own in results.runs.values() for run in own]
    facts = runs[0].facts
    usual = {x.name: x.default for x in dataclasses.fields(Settings)}
    usual |= {"steps": controls.STEPS, "eval_every": controls.EVAL_EVERY}
    command = ["python", "-m", "experiments.reproduce"]
    command += [f"--preset={control.name}"]
    # Those of the article's settings that nothing is said of are left out:
    # other controls may need them.
    told = {
        (run.condition.number, run.seed)
        for arm in control.own_arms
        for run in results.runs.get(arm.name, ())
    } | results.told()
    conditions = tuple(sorted({number for number, _ in told}))
    if conditions != control.conditions:
        command += [f"--conditions={','.join(map(str, conditions))}"]
    command += [f"--seeds={1 + max(seed for _, seed in told)}"]
    command += [f"--dataset={facts['dataset']}", "--output=RESULTS"]
    for name in _FLAGS:
        own = facts.get(name, usual[name])
        if name not in control.changed and own != usual[name]:
            command.append(f"--{name}={own}")
    if facts.get("shuffle") and "shuffle" not in control.changed:
        command.append("--shuffle")
    return "\n".join(
        [
            paragraphs(["Once more, with RESULTS the folder of this report:"]),
            commands(
                _backend(facts) + shlex.join(command),
                f"Command of the control experiment {control.name}",
            ),
        ]
    )


def _backend(facts):
    backend = facts.get("backend")
    return f"KERAS_BACKEND={backend} " if backend else ""


def _launch(facts):
    """Returns what starts a run's processes, as three parts.

    They are a program, variables before it, and sentences that explain it.
    """
    replicas = facts["replicas"]
    if facts["distribution"] == "ddp":
        return ["torchrun", f"--nproc_per_node={replicas}"], "", []
    if facts["distribution"] != "multiworker":
        return ["python"], "", []
    addresses = [f"127.0.0.1:{2222 + x}" for x in range(replicas)]
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"worker": addresses}, "task": task}
    return (
        ["python"],
        f"TF_CONFIG={shlex.quote(json.dumps(config))} ",
        [
            f"The run had {replicas} replicas: start one worker for each, "
            "all at once, with an index of its own from 0. A worker that has "
            "several GPUs is several replicas."
        ],
    )

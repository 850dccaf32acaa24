"""What made the results of a report, and how to make them once more."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from collections.abc import Sequence

from experiments import same_settings
from experiments.report_html import escape
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_summaries import Contents
from experiments.result_files import Run


def settings_of(runs: Sequence[Run], facts: Mapping[str, str]) -> str:
    """The section on what made the results.

    Args:
        runs: at least one.
        facts: name -> text of what is known of them all already.
    """
    facts = dict(facts)
    for name in same_settings.SETTINGS + same_settings.CIRCUMSTANCES:
        if not (facts and name.startswith("dataset")):
            facts[name.replace("_", " ")] = same_settings.describe(
                runs[0].facts.get(name)
            )
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td>'
        "</tr>"
        for name, value in facts.items()
    )
    notes = same_settings.differing_circumstances(runs)
    return section(
        "What made these results",
        '<div class="wide"><table class="settings"><caption>Settings, '
        "hardware and software of the runs; as the first of them has them "
        f"where a note below says that they differ.</caption>\n{rows}\n"
        "</table></div>",
        paragraphs(notes, "note"),
    )


def regenerate(contents: Contents) -> str:
    """The commands that make the results, and the page, once more."""
    facts = contents.runs[0].facts
    launch, variables, explained = _launch(facts)
    train = [*launch, "-m", "experiments.train"]
    train += ["--condition=N", "--seed=N", "--output=RESULTS"]
    for name in (
        "dataset",
        "steps",
        "eval_every",
        "batch_size",
        "optimizer",
        "learning_rate",
        "input",
        "layer",
        "placement",
        "distribution",
    ):
        if name in facts:
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
    backend = facts.get("backend")
    prefix = f"KERAS_BACKEND={backend} " if backend else ""
    prefix += variables
    commands = f"{prefix}{shlex.join(train)}\n{shlex.join(report)}"
    return (
        paragraphs(
            [
                "From a clone of the repository at the revision above, with "
                "RESULTS the folder of this report: each run, then the page.",
                *explained,
            ]
        )
        + f"\n<pre>{escape(commands)}</pre>"
    )


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

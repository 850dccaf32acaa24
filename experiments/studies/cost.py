"""What does batch normalization cost, and is something else cheaper?"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from experiments import ExperimentError
from experiments import child_process
from experiments import data
from experiments import raise_if_interrupted
from experiments import run_model
from experiments import train
from experiments.controls import Arm
from experiments.studies import records
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.study import with_keras_layer
from experiments.studies.verdict import Question

_KINDS = {
    "none": "without",
    "batch": "batch normalization",
    "group": "group normalization",
    "instance": "instance normalization",
    "layer": "layer normalization",
}
# Percent of the step of a network without normalization.
_LEAST_TIME = 5.0
# Megabytes, of a step on `MEMORY_BATCH` images.
_LEAST_MEMORY = 5.0
MEMORY_BATCH = 1_024


def _question(what, words, ours, others, minimum, unit, when):
    return Question(
        words,
        (f"{what}, {ours}",),
        (f"{what}, {others}",),
        minimum,
        (),
        when,
        unit,
        1.0,
    )


class Cost(Study):
    name = "cost"
    title = "Cost"
    claim = (
        "Batch normalization costs time and memory; group and instance "
        "normalization may cost less."
    )
    source = "article 000, 5 (problem 3)"
    arms = tuple(
        Arm(kind, words, {"architecture": Architecture(kind)})
        for kind, words in _KINDS.items()
    )
    questions = (
        _question(
            "time",
            "Time that batch normalization adds to a training step",
            "batch",
            "none",
            _LEAST_TIME,
            "% of a step without",
            "for time",
        ),
        _question(
            "memory",
            f"Memory that it adds to a step on {MEMORY_BATCH:,} images",
            "batch",
            "none",
            _LEAST_MEMORY,
            "MB",
            "for memory",
        ),
        *(
            _question(
                "time",
                f"Time of {_KINDS[kind]} that batch normalization takes more",
                "batch",
                kind,
                _LEAST_TIME,
                "% of a step without",
                f"for {_KINDS[kind]} being cheaper",
            )
            for kind in ("group", "instance")
        ),
    )
    axis = "what is asked"
    would_change = (
        "An accelerator, where memory traffic is most of the cost, or a "
        "network whose convolutions take longer: the share is smaller there."
    )
    # A seed is a round of measurements here; steps is how many there are.
    real = dataclasses.replace(
        REAL, seeds=5, steps=60, eval_every=60, train_images=MEMORY_BATCH
    )
    quick = dataclasses.replace(QUICK, steps=3, arms=("none", "batch"))
    unit = "CPU time of a training step, ms"

    def settings(self, quick, layer):
        """Every arm for Keras's layer too: only what took turns compares."""
        ours = super().settings(quick, "keras_bn")
        if layer != "keras":
            return ours
        return [with_keras_layer(x) for x in ours]

    def train(self, runs, dataset, folder):
        """Times the steps of a round in turn, so that they compare."""
        for seed in sorted({x.seed for x in runs}):
            own = [x for x in runs if x.seed == seed]
            timings = _timings(own, dataset)
            for settings in own:
                raise_if_interrupted()
                cpu, wall = timings[settings.arm]
                measures = {
                    "cpu_ms": 1e3 * float(np.median(cpu)),
                    "wall_ms": 1e3 * float(np.median(wall)),
                    "memory_mb": _memory(settings),
                }
                facts = train.describe(settings, dataset)
                records.add_lines(folder, facts, [], [], measures)

    def quantities(self, runs):
        found = {}
        for arm, own in runs.items():
            found[arm] = {x: y.measures["cpu_ms"] for x, y in own.items()}
            found[f"memory, {arm}"] = {
                x: y.measures["memory_mb"] for x, y in own.items()
            }
        for arm in runs:
            found[f"time, {arm}"] = {
                seed: 100 * value / found["none"][seed]
                for seed, value in found[arm].items()
                if seed in found.get("none", {})
            }
        return found

    def caption(self, results):
        found = {
            arm: list(results.quantities[f"memory, {arm}"].values())
            for arm in results.arms
        }
        memory = "; ".join(
            f"{self.words(arm)} {np.mean(values):.0f}"
            for arm, values in found.items()
        )
        return (
            "Each dot is a round of measurements in which the networks take "
            "turns, the bar their mean: CPU milliseconds of a training step on "
            f"{self.real.batch_size} images, the median of "
            f"{results.facts['steps']}. Peak memory that a step on "
            f"{MEMORY_BATCH:,} images adds to one on 8, in MB: {memory}."
        )


def _timings(runs, dataset):
    from experiments.benchmark_child import interleaved

    calls = {}
    for settings in runs:
        model = run_model.build(settings)
        batches = data.Batches(dataset, settings.batch_size, settings.input)
        images, labels = batches[0]

        def step(model=model, images=images, labels=labels):
            return model.train_on_batch(images, labels)

        calls[settings.arm] = step
    return interleaved(calls, runs[0].steps)


def _memory(settings):
    """Megabytes, in a process of its own: a peak cannot be taken back."""
    answers = []
    try:
        child_process.ask(
            "experiments.studies.cost",
            dataclasses.asdict(settings.architecture),
            {},
            answers.append,
        )
    except child_process.ChildError as error:
        raise ExperimentError(f"measuring memory failed: {error}") from error
    return answers[-1]["megabytes"]


def _child():
    """Answers how much more a step on many images needs than one on few."""
    answer = child_process.answering()
    architecture = Architecture(**json.load(sys.stdin))
    settings = STUDY.settings(quick=True, layer="keras_bn")[0]
    model = run_model.build(
        dataclasses.replace(settings, architecture=architecture)
    )
    generator = np.random.default_rng(0)
    peaks = []
    for count in (8, MEMORY_BATCH):
        images = generator.standard_normal((count, 16, 16, 3), "float32")
        labels = generator.integers(0, 10, count)
        for _ in range(3):
            model.train_on_batch(images, labels)
        peaks.append(_peak())
    answer(megabytes=peaks[1] - peaks[0])


def _peak():
    """Megabytes of memory that this process has had at most; NaN: unknown."""
    # On Linux getrusage begins with the peak of the process before exec.
    status = Path("/proc/self/status")
    if status.exists():
        text = status.read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", text).group(1)) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    # Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


STUDY = Cost()

if __name__ == "__main__":
    _child()

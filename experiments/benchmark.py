"""Times batch normalization beside its peers and beside the memory's speed.

    python -m experiments.benchmark --output=benchmark.json

On each backend this project's layer, Keras's and the framework's own peer
(tf-keras's older fused layer, PyTorch's, Flax's) normalize the same tensors:
at inference, forward in training, and forward and backward. The floor is
the time the memory needs to move what an ideal layer moves, told from a copy
of a tensor of the same size that is timed in between. CPU time counts all
threads and is the figure to compare: wall time varies with what else runs on
the machine. Everything runs on the CPU.

Last, a training step of the article's network shows what batch normalization
adds to a whole model.
"""

import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import numpy as np
from absl import flags
from rich.console import Console

from experiments import ExperimentError
from experiments import atomic
from experiments import child_process
from experiments import launch
from experiments import machine
from experiments import progress
from experiments.benchmark_candidates import OPERATIONS
from experiments.benchmark_candidates import PEERS
from experiments.benchmark_candidates import has_peer
from experiments.benchmark_tables import print_tables

_BACKENDS = flags.DEFINE_list(
    "backends",
    None,
    "backends to time on: tensorflow, jax, torch (default: those installed)",
)
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["128x32x32x32", "128x16x16x64", "32x56x56x256", "128x1024"],
    "shapes of the tensors, channels last",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "dtype of the tensors; parameters and statistics stay in float32",
)
_REPETITIONS = flags.DEFINE_integer(
    "repetitions",
    15,
    "measurements of each call; a third as many of the variants",
    lower_bound=1,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write the measurements to"
)

# How often a tensor passes through the memory: a copy reads once and writes
# once. Training reads x for the moments, then reads x and writes y; backward
# reads x and dy for the sums, then reads x and dy and writes dx.
COPY_PASSES = 2
FLOOR_PASSES = {"inference": 2, "forward": 3, "forward_backward": 8}

CHILD_ENVIRONMENT = {
    # malloc keeps large tensors, for all threads, instead of returning them
    # to the system: a page fault costs more here than the arithmetic.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    # Idle OpenMP threads sleep; spinning, they would be billed to whatever
    # is measured next.
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "KERAS_TORCH_DEVICE": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_PACKAGES = (
    "keras",
    "tensorflow",
    "tf-keras",
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "numpy",
)


def parse_shape(text: str) -> list[int]:
    """Reads a shape such as `128x32x32x32`.

    Args:
        text: two to five positive sizes, joined by `x`, channels last.

    Returns:
        The sizes.

    Raises:
        ExperimentError: the text is no such shape, or a channel has one
            value alone, which cannot be normalized in training.
    """
    parts = text.strip().split("x")
    if not (2 <= len(parts) <= 5) or not all(
        part.isdecimal() and int(part) > 0 for part in parts
    ):
        raise ExperimentError(
            "--shapes takes two to five positive sizes joined by x, as in "
            f"128x32x32x32. Received: {text!r}"
        )
    shape = [int(part) for part in parts]
    if math.prod(shape[:-1]) == 1:
        raise ExperimentError(
            "--shapes needs two or more values in a channel, as in 2x8. "
            f"Received: {text!r}"
        )
    return shape


def parse_shapes(texts: list[str]) -> list[list[int]]:
    """Reads shapes as `parse_shape` does, each of them once.

    Raises:
        ExperimentError: there is none, or a text is no such shape.
    """
    shapes = []
    for shape in map(parse_shape, texts):
        # Timings are told apart by their shape.
        if shape not in shapes:
            shapes.append(shape)
    if not shapes:
        raise ExperimentError("--shapes is empty; name one as 128x1024")
    return shapes


def parse_backends(names: list[str] | None) -> list[str]:
    """Checks the backends asked for, or finds those installed.

    Args:
        names: backends, or None for all that are installed.

    Returns:
        The backends to time on, each once.

    Raises:
        ExperimentError: one is unknown or not installed, or none is.
    """
    if names is None:
        installed = [name for name in PEERS if find_spec(name)]
        if not installed:
            raise ExperimentError(f"install one of {', '.join(PEERS)}")
        return installed
    for name in names:
        if name not in PEERS:
            raise ExperimentError(
                f"--backends takes {', '.join(PEERS)}. Received: {name!r}"
            )
        if not find_spec(name):
            raise ExperimentError(
                f"--backends names {name}, which is not installed; "
                "install it or leave it out"
            )
    if not names:
        raise ExperimentError(f"--backends is empty; name {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def measure(
    backend: str, request: dict, on_progress: Callable[[str], None]
) -> list | dict:
    """Runs a request in a fresh process on one backend.

    Args:
        backend: the backend Keras runs on there.
        request: what `experiments.benchmark_child` is to do.
        on_progress: called with a few words before each step of it.

    Returns:
        What the process measured.

    Raises:
        ExperimentError: the process failed; the last line it wrote says how.
    """
    result = None

    def on_answer(answer: dict) -> None:
        nonlocal result
        if "progress" in answer:
            on_progress(f"{backend} {answer['progress']}")
        result = answer.get("result")

    try:
        child_process.ask(
            "experiments.benchmark_child",
            request | {"backend": backend},
            CHILD_ENVIRONMENT | {"KERAS_BACKEND": backend},
            on_answer,
        )
    except child_process.ChildError as error:
        raise ExperimentError(f"timing on {backend} failed: {error}") from error
    return result


def summarize(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of repeated measurements, in their unit."""
    lower, median, upper = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def compare(entries: list[dict]) -> list[dict]:
    """Sets the measurements of one backend against floor and Keras.

    Args:
        entries: what `benchmark_child.measure_shape` returns, of one
            backend and any number of shapes.

    Returns:
        One entry per layer, operation and shape, the copies left out:
        `cpu_seconds` and `wall_seconds` (median and quartiles per call),
        `floor_cpu_seconds` and `floor_wall_seconds`, and the ratios of
        medians `cpu_to_floor`, `cpu_to_keras`, `wall_to_floor`,
        `wall_to_keras`. A variant is set against Keras's where that exists,
        else against Keras's plain layer.
    """
    medians = {
        (str(entry["shape"]), entry["operation"], entry["name"], clock): (
            float(np.median(entry[clock]))
        )
        for entry in entries
        for clock in ("cpu", "wall")
    }
    compared = []
    for entry in entries:
        if entry["name"] == "copy":
            continue
        row = {
            key: entry[key]
            for key in ("backend", "shape", "dtype", "operation", "name")
        }
        group = (str(entry["shape"]), entry["operation"])
        counterpart = "keras"
        if entry["name"].startswith("keras"):
            counterpart = entry["name"].replace("keras_bn", "keras")
        copies = FLOOR_PASSES[entry["operation"]] / COPY_PASSES
        for clock in ("cpu", "wall"):
            own = medians[*group, entry["name"], clock]
            floor = copies * medians[*group, "copy", clock]
            row[f"{clock}_seconds"] = summarize(entry[clock])
            row[f"floor_{clock}_seconds"] = floor
            row[f"{clock}_to_floor"] = own / floor
            row[f"{clock}_to_keras"] = own / medians.get(
                (*group, counterpart, clock), medians[*group, "keras", clock]
            )
        compared.append(row)
    return compared


def compare_training_steps(steps: dict[str, dict]) -> dict[str, dict]:
    """What batch normalization adds to a training step.

    Args:
        steps: what `benchmark_child.measure_training_step` returns.

    Returns:
        From `none`, `keras_bn` and `keras` to `cpu_seconds` and
        `wall_seconds` (median and quartiles per step) and
        `cpu_added_percent` and `wall_added_percent` over `none`.
    """
    compared = {}
    for name, clocks in steps.items():
        compared[name] = {}
        for clock in ("cpu", "wall"):
            base = np.median(steps["none"][clock])
            added = 100 * (float(np.median(clocks[clock])) / base - 1)
            compared[name][f"{clock}_seconds"] = summarize(clocks[clock])
            compared[name][f"{clock}_added_percent"] = float(added)
    return compared


def describe_machine() -> dict:
    """The processor, the system and the versions of the packages."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": machine.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
    }


def run() -> None:
    """Measures what the flags ask for; prints it and writes it."""
    backends = parse_backends(_BACKENDS.value)
    shapes = parse_shapes(_SHAPES.value)
    if _OUTPUT.value is not None:
        atomic.check_writable(_OUTPUT.value)  # before minutes of measuring
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "command": shlex.join(
            ["python", "-m", "experiments.benchmark", *sys.argv[1:]]
        ),
        "machine": describe_machine(),
        "environment": CHILD_ENVIRONMENT,
        "dtype": _DTYPE.value,
        "repetitions": _REPETITIONS.value,
        "left_out": [
            f"{PEERS[name][0]} on {name}: not installed"
            for name in backends
            if not has_peer(name)
        ],
        "measurements": [],
        "training_step": {},
    }
    request = {
        "task": "layers",
        "shapes": shapes,
        "dtype": _DTYPE.value,
        "repetitions": _REPETITIONS.value,
    }
    groups = len(backends) * len(shapes) * len(OPERATIONS)
    groups += "tensorflow" in backends
    with progress.bar("starting", groups, " groups") as bar:
        begun = False

        def advance(words: str) -> None:
            nonlocal begun
            bar.update(begun)
            bar.set_description(words)
            begun = True

        for backend in backends:
            report["measurements"] += compare(
                measure(backend, request, advance)
            )
        if "tensorflow" in backends:
            report["training_step"] = compare_training_steps(
                measure(
                    "tensorflow", request | {"task": "training_step"}, advance
                )
            )
        else:
            report["left_out"].append("training step: needs tensorflow")
        bar.update()
    print_tables(report, Console())
    if _OUTPUT.value is not None:
        atomic.write_text(_OUTPUT.value, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    launch(lambda argv: run())

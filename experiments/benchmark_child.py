"""The process in which the benchmark times one backend.

Keras runs on one backend per process, so `experiments.benchmark` starts this
module once for each: a request comes in as JSON on standard input, and lines
of JSON go out on standard output, `{"progress": text}` before each group of
measurements and `{"result": ...}` at the end.
"""

import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments import article
from experiments import benchmark_candidates
from experiments import child_process
from experiments import models

# A measurement repeats its call until it lasts about this long, so that the
# clock's own cost and resolution do not show.
SHORTEST_MEASUREMENT_SECONDS = 5e-3
WARM_UP_CALLS = 3


class Timings(NamedTuple):
    """Seconds per call, one entry per repetition."""

    cpu: list[float]
    wall: list[float]


def interleaved(
    calls: dict[str, Callable[[], object]],
    repetitions: int,
    seldom: frozenset[str] = frozenset(),
) -> dict[str, Timings]:
    """Times several calls in turn, over and over.

    Each repetition times every call once, in an order of its own, so that a
    slow spell of the machine, and a cache that the call before it has filled
    with something else, fall on all alike.

    Args:
        calls: from a name to a call without arguments.
        repetitions: how many times each is measured.
        seldom: names that are measured in every third repetition only.

    Returns:
        From each name to its timings: CPU seconds of all threads of the
        process, and wall seconds, per call.
    """
    numbers = {}
    for name, call in calls.items():
        for _ in range(WARM_UP_CALLS):
            call()
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        numbers[name] = max(
            1, math.ceil(SHORTEST_MEASUREMENT_SECONDS / seconds)
        )
    timings = {name: Timings([], []) for name in calls}
    names, order = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for repetition in range(repetitions):
            order.shuffle(names)
            for name in names:
                if repetition % 3 and name in seldom:
                    continue
                call, number = calls[name], numbers[name]
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(number):
                    call()
                timings[name].wall.append((time.perf_counter() - wall) / number)
                timings[name].cpu.append((time.process_time() - cpu) / number)
    finally:
        gc.enable()
    return timings


def measure_shape(
    backend: str,
    shape: list[int],
    dtype: str,
    repetitions: int,
    on_operation: Callable[[str], None],
) -> list[dict]:
    """Times every layer on tensors of one shape.

    Args:
        backend: the backend Keras runs on in this process.
        shape: `(batch, ..., channels)`.
        dtype: `float32`, `bfloat16` or `float16`.
        repetitions: how many times each call is measured; the variants are
            in every third of them.
        on_operation: called with each operation's name before it is timed.

    Returns:
        One entry per operation and layer, the copy of a tensor of the same
        shape and width among them under the name `copy`: `backend`,
        `shape`, `dtype`, `operation`, `name`, and `cpu` and `wall`, lists of
        seconds per call.
    """
    generator = np.random.default_rng(0)
    inputs = generator.normal(0.5, 2.0, shape).astype("float32")
    gradient = generator.standard_normal(shape, "float32")
    layers = benchmark_candidates.candidates(backend, inputs, gradient, dtype)
    variants = frozenset(
        layer.name
        for layer in layers
        if len(layer.operations) < len(benchmark_candidates.OPERATIONS)
    )
    width = "float32" if dtype == "float32" else "uint16"
    source = inputs.astype(width)
    target = np.empty_like(source)
    target[...] = 0
    del inputs, gradient
    entries = []
    for operation in benchmark_candidates.OPERATIONS:
        on_operation(operation)
        calls = {
            layer.name: layer.operations[operation]
            for layer in layers
            if operation in layer.operations
        }
        calls["copy"] = lambda: np.copyto(target, source)
        measured = interleaved(calls, repetitions, variants)
        for name, timings in measured.items():
            entries.append(
                {
                    "backend": backend,
                    "shape": shape,
                    "dtype": dtype,
                    "operation": operation,
                    "name": name,
                    "cpu": timings.cpu,
                    "wall": timings.wall,
                }
            )
    return entries


def measure_training_step(repetitions: int) -> dict[str, dict]:
    """Times a training step of the article's network on TensorFlow.

    Conditions 0 (no batch normalization) and 9 (after both convolutions and
    the dense layer), the latter with this project's layer and with Keras's.

    Args:
        repetitions: how many times each step is measured.

    Returns:
        From `none`, `keras_bn` and `keras` to `cpu` and `wall`, lists of
        seconds per step on a batch of 128 images.
    """
    import keras
    import tensorflow as tf

    generator = np.random.default_rng(0)
    images = generator.uniform(0, 255, (article.BATCH_SIZE, 32, 32, 3))
    images = tf.constant(images, "float32")
    labels = tf.constant(generator.integers(0, 10, article.BATCH_SIZE))

    def step(number: int, layer: str) -> Callable[[], object]:
        model = models.build(article.condition(number), layer=layer)
        model.compile(
            keras.optimizers.Adam(
                article.LEARNING_RATE, epsilon=article.ADAM_EPSILON
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # What "auto" comes to for TensorFlow on a CPU.
            jit_compile=False,
        )
        return lambda: model.train_on_batch(images, labels)

    steps = {
        "none": step(0, "keras"),
        "keras_bn": step(9, "keras_bn"),
        "keras": step(9, "keras"),
    }
    return {
        name: timings._asdict()
        for name, timings in interleaved(steps, repetitions).items()
    }


def main() -> None:
    """Reads the request, measures, writes the result."""
    answer = child_process.answering()
    request = json.load(sys.stdin)
    if request["task"] == "training_step":
        answer(progress="training step")
        answer(result=measure_training_step(request["repetitions"]))
        return
    benchmark_candidates.make_replicas(request["backend"])
    entries = []
    for shape in request["shapes"]:
        size = "x".join(map(str, shape))
        entries += measure_shape(
            request["backend"],
            shape,
            request["dtype"],
            request["repetitions"],
            lambda operation, size=size: answer(progress=f"{size} {operation}"),
        )
    answer(result=entries)


if __name__ == "__main__":
    main()

"""Checks and times TensorFlow on this machine's GPU, beside its CPU.

    python -m experiments.train --preset=gpu_check

For conditions 0 and 9, the article's without and with batch normalization:
the test loss before training and after a few steps on each device, the steps
per second, and the operations per second that they are, to be divided by the
peak in the chip's data sheet. Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments import ExperimentError
from experiments import checkpoint
from experiments import data
from experiments import run_model
from experiments.distribution.workers import Workers
from experiments.run_settings import Settings

if TYPE_CHECKING:
    import keras

CONDITIONS = (0, 9)
COMPARED_STEPS = 10
TIMED_STEPS = 500
TEST_IMAGES = 1_000
# How much of the CPU's loss the GPU's may differ by. TensorFlow multiplies
# with 10 bits after the point on recent GPUs (TF32), and Adam's first steps
# make as much of a small gradient as of a large one.
TOLERANCES = {0: 0.01, COMPARED_STEPS: 0.1}
_CPU = "CPU:0"


def gpus() -> list[str]:
    """Returns the names of TensorFlow's GPUs.

    Raises:
        ExperimentError: Keras runs on another backend, or there is none.
    """
    import keras

    check_backend(keras.backend.backend())
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    if not found:
        raise ExperimentError(
            "gpu_check needs a GPU, and TensorFlow finds none: install "
            "tensorflow[and-cuda] and NVIDIA's driver, or train on the CPU "
            "with --condition=9"
        )
    details = map(tf.config.experimental.get_device_details, found)
    return [x.get("device_name", "GPU of unknown name") for x in details]


def check_backend(backend: str | None) -> None:
    """Finds out whether a backend is TensorFlow.

    Args:
        backend: name of it; None where it is not known yet.

    Raises:
        ExperimentError: it is not.
    """
    if backend not in (None, "tensorflow"):
        raise ExperimentError(
            "gpu_check is TensorFlow's: set KERAS_BACKEND=tensorflow. "
            f"Received: KERAS_BACKEND={backend}"
        )


def check(
    condition: int,
    dataset: data.Dataset,
    device: str = "GPU:0",
    timed_steps: int = TIMED_STEPS,
    write: Callable[[str], None] = print,
) -> bool:
    """Trains a condition for a moment on a device and on the CPU.

    Args:
        condition: the article's number.
        dataset: what to train on.
        device: TensorFlow's name of it.
        timed_steps: how many steps to time.
        write: is given each line that is to be said.

    Returns:
        Whether the losses agree.
    """
    # It needs Keras, whose backend has been looked at by now.
    from experiments import device_loop

    # On raw pixels the loss after some steps hangs on rounding.
    settings, agree = Settings(condition, input="standardized"), True
    batches = data.Batches(dataset, settings.batch_size, settings.input)
    _, of_cpu = _losses(Workers(), settings, batches, dataset, _CPU)
    workers = device_loop.of_backend()
    model, of_device = _losses(workers, settings, batches, dataset, device)
    for step, tolerance in TOLERANCES.items():
        expected, found = of_cpu[step], of_device[step]
        agrees = abs(found - expected) <= tolerance * expected
        agree = agree and agrees
        write(
            f"condition {condition}, step {step}: test loss {found:.4f} on "
            f"{device}, {expected:.4f} on {_CPU}: "
            f"{'agrees' if agrees else 'DIFFERS'} ({tolerance:.0%})"
        )
    speed, bare = _speeds(workers, model, batches, device, timed_steps)
    operations = bare * operations_per_image(model) * settings.batch_size
    write(
        f"condition {condition}: {speed:.0f} steps/s, {bare:.0f} steps/s of "
        f"computing alone, which are {operations / 1e9:.1f} GFLOP/s in "
        "convolutions and dense layers"
    )
    return agree


def operations_per_image(model: keras.Model) -> int:
    """Floating-point operations of a training step, for one image.

    Those of convolutions and dense layers: a multiplication and an addition
    for each weight at each position, forward, and as many for the gradients
    of the weights and of the inputs each, but for those of the images.

    Args:
        model: of layers one after another.
    """
    forward = [
        2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
        for layer in model.layers
        if hasattr(layer, "kernel")
    ]
    return 3 * sum(forward) - sum(forward[:1])


def _losses(workers, settings, batches, dataset, device):
    import tensorflow as tf

    images = batches.prepare(dataset.test_images[:TEST_IMAGES])
    labels = dataset.test_labels[:TEST_IMAGES]
    losses = {}
    with tf.device(device):
        model = run_model.build(settings)
        if device == _CPU:
            # Where there is a GPU Keras would compile for the CPU by XLA too,
            # and an error of XLA's would be on both.
            model.jit_compile = False
        checkpoint.state(model)  # makes the optimizer's variables here
        workers.start(model, lambda: run_model.build(settings))
        step = 0
        for until in TOLERANCES:
            step = _advance(workers, batches, step, until)
            losses[until] = workers.evaluate(images, labels)["loss"]
    return model, losses


def _advance(workers, batches, step, until):
    """Takes the steps up to `until`; returns that number."""
    while step < until:
        step += len(workers.take_steps(batches, step, until))
    return until


def _speeds(workers, model, batches, device, steps):
    """Returns steps per second: as trained, and of what is compiled alone."""
    import tensorflow as tf

    with tf.device(device):
        began = time.perf_counter()
        _advance(workers, batches, COMPARED_STEPS, COMPARED_STEPS + steps)
        trained = time.perf_counter() - began
        compiled = tf.function(model.train_step, jit_compile=model.jit_compile)
        batch = tuple(map(tf.constant, batches[0]))
        compiled(batch)
        began = time.perf_counter()
        for step in range(steps):
            logs = compiled(batch)
        float(logs["loss"])  # waits for all
        bare = time.perf_counter() - began
    return steps / trained, steps / bare

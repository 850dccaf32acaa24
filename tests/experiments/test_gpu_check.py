"""The check of a reader's GPU, on machines that have none."""

import keras
import pytest

from experiments import ExperimentError
from experiments import checkpoint
from experiments import data
from experiments import gpu_check
from experiments import run_model
from experiments.run_settings import Settings

_BACKEND = keras.backend.backend()


def test_no_gpu_is_one_line():
    said = {
        "tensorflow": "gpu_check needs a GPU, and TensorFlow finds none",
        "jax": "Received: KERAS_BACKEND=jax",
        "torch": "Received: KERAS_BACKEND=torch",
    }[_BACKEND]
    with pytest.raises(ExperimentError, match=said):
        gpu_check.gpus()


if _BACKEND == "tensorflow":
    import tensorflow as tf

    def test_what_it_says(monkeypatch):
        monkeypatch.setattr(gpu_check, "COMPARED_STEPS", 1)
        monkeypatch.setattr(gpu_check, "TOLERANCES", {0: 0.01, 1: 0.1})
        lines, digits = [], data.load("digits")
        # The CPU for the GPU: all is there but the other device.
        assert gpu_check.check(9, digits, "CPU:0", 2, lines.append)
        assert [x.split(":")[0] for x in lines] == [
            "condition 9, step 0",
            "condition 9, step 1",
            "condition 9",
        ]
        assert lines[0].endswith("agrees (1%)")
        assert lines[1].endswith("agrees (10%)")
        speed, bare = (float(x) for x in lines[2].split() if x.isdecimal())
        # Computing alone is a part of the step.
        assert 0 < speed < 10 * bare

    def test_operations_are_those_of_tensorflows_profiler():
        model = run_model.build(Settings(0))
        checkpoint.state(model)
        batch = (
            tf.TensorSpec((4, 32, 32, 3)),
            tf.TensorSpec((4,), tf.int32),
        )
        step = tf.function(model.train_step).get_concrete_function(batch)
        options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
        node = tf.compat.v1.profiler.profile(
            step.graph, cmd="op", options=options | {"output": "none"}
        )
        found = {}
        while node.children:
            (node,) = node.children
            found[node.name] = node.float_ops
        counted = sum(
            found[name]
            for name in (
                "Conv2D",
                "Conv2DBackpropFilter",
                "Conv2DBackpropInput",
                "MatMul",
            )
        )
        # The graph has the gradient of the images, which is never computed.
        counted -= 4 * 2 * (32 * 32 * 32) * (5 * 5 * 3)
        assert 4 * gpu_check.operations_per_image(model) == counted

    def test_other_losses_are_said(monkeypatch):
        losses = iter([({0: 2.3, 10: 1.0}), ({0: 2.3, 10: 1.2})])
        monkeypatch.setattr(
            gpu_check,
            "_losses",
            lambda *given: (keras.Sequential(), next(losses)),
        )
        monkeypatch.setattr(gpu_check, "_speeds", lambda *given: (10, 20))
        lines = []
        digits = data.load("digits")
        assert not gpu_check.check(0, digits, write=lines.append)
        assert lines[1].startswith("condition 0, step 10: test loss 1.2000")
        assert lines[1].endswith("DIFFERS (10%)")

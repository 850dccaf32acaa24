"""The check of a reader's GPU, on machines that have none."""

import json
import subprocess
import sys

import keras
import pytest

from experiments import ExperimentError
from experiments import checkpoint
from experiments import data
from experiments import gpu_check
from experiments import run_model
from experiments.run_settings import Settings

_BACKEND = keras.backend.backend()


# A second CPU for the GPU, and XLA, as Keras has it where there is a GPU.
_TWO_DEVICES = """
import json
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)

from keras.src.trainers import trainer
from experiments import data, gpu_check, run_model

trainer.Trainer._resolve_auto_jit_compile = lambda self: True
gpu_check.COMPARED_STEPS = 1
gpu_check.TOLERANCES = {0: 0.01, 1: 0.1}
gpu_check.TEST_IMAGES = 8
models, build = [], run_model.build
def kept(settings):
    models.append(build(settings))
    return models[-1]

run_model.build = kept
lines = []
assert gpu_check.check(9, data.load("digits"), "CPU:1", 2, lines.append)
for model in models:
    variables = [*model.variables, *model.optimizer.variables]
    devices = {x.value.device.rsplit("/device:")[-1] for x in variables}
    print(json.dumps([model.jit_compile, sorted(devices)]))
print(json.dumps(lines))
"""


def test_no_gpu_is_one_line(monkeypatch):
    if _BACKEND == "tensorflow":
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [])
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
        assert speed > 0 < bare

    def test_each_model_is_on_its_device():
        done = subprocess.run(
            [sys.executable, "-c", _TWO_DEVICES],
            capture_output=True,
            text=True,
            check=True,
        )
        *models, lines = map(json.loads, done.stdout.splitlines())
        assert models == [[False, ["CPU:0"]], [True, ["CPU:1"]]]
        assert " on CPU:1, " in lines[0]

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

    @pytest.mark.parametrize("loss", [1.2, 0.8, float("nan")])
    def test_other_losses_are_said(monkeypatch, loss):
        losses = iter([({0: 2.3, 10: 1.0}), ({0: 2.3, 10: loss})])
        monkeypatch.setattr(
            gpu_check,
            "_losses",
            lambda *given: (keras.Sequential(), next(losses)),
        )
        monkeypatch.setattr(gpu_check, "_speeds", lambda *given: (10, 20))
        lines = []
        digits = data.load("digits")
        assert not gpu_check.check(0, digits, write=lines.append)
        assert f"step 10: test loss {loss:.4f} on GPU:0" in lines[1]
        assert lines[1].endswith("DIFFERS (10%)")

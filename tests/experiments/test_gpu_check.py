"""The check of a reader's GPU, on machines that have none."""

import keras
import pytest

from experiments import ExperimentError
from experiments import data
from experiments import gpu_check

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

    def test_other_losses_are_said(monkeypatch):
        losses = iter([({0: 2.3, 10: 1.0}), ({0: 2.3, 10: 1.2})])
        monkeypatch.setattr(
            gpu_check, "_losses", lambda *given: (None, next(losses))
        )
        monkeypatch.setattr(gpu_check, "_speeds", lambda *given: (10, 20))
        lines = []
        assert not gpu_check.check(0, None, write=lines.append)
        assert lines[1].startswith("condition 0, step 10: test loss 1.2000")
        assert lines[1].endswith("DIFFERS (10%)")

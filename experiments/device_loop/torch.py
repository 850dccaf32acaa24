"""PyTorch's loop: steps are queued, and reports waited for after a call.

Keras's Adam waits for the device in each step nevertheless, for it hands
numbers over, and so does its dropout, which reads the state of its generator.
"""

from __future__ import annotations

import keras
import torch

from experiments import checkpoint
from experiments.device_loop import DeviceLoop
from experiments.device_loop import on_device
from experiments.device_loop import report


class TorchLoop(DeviceLoop):
    """On Keras's device of PyTorch."""

    def _begin(self):
        checkpoint.state(self._model)  # makes the optimizer's variables

    def _placed(self, images, labels):
        # Keras's conversion puts them on its device.
        return tuple(map(keras.ops.convert_to_tensor, (images, labels)))

    def _take(self, images, labels, rows, count):
        rows = keras.ops.convert_to_tensor(rows[:count])
        return _together(
            [self._step(images[batch], labels[batch]) for batch in rows]
        )

    def _test(self, images, labels, rows):
        rows = keras.ops.convert_to_tensor(rows)
        with torch.no_grad():
            return _together(
                [self._test_one(images[batch], labels[batch]) for batch in rows]
            )

    def _compile_steps(self, prepare):
        self._prepare = on_device(prepare)

    def _compile_test(self):
        pass

    def _step(self, images, labels):
        model = self._model
        model.zero_grad()
        logits = model(self._prepare(images), training=True)
        loss, accuracy = report(labels, logits, model.losses)
        loss.backward()
        variables = model.trainable_variables
        with torch.no_grad():
            model.optimizer.apply([x.value.grad for x in variables], variables)
        return torch.stack([loss.detach(), accuracy])

    def _test_one(self, images, labels):
        logits = self._model(images, training=False)
        return torch.stack(report(labels, logits, self._model.losses))


def _together(reports):
    """Returns what the host gets of some reports, all at once."""
    return torch.stack(reports).cpu().numpy()

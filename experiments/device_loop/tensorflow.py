"""TensorFlow's loop: a graph that takes one compiled step after another."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from experiments import checkpoint
from experiments.device_loop import DeviceLoop
from experiments.device_loop import on_device
from experiments.device_loop import report


class TensorFlowLoop(DeviceLoop):
    """On a device of TensorFlow.

    A step is compiled by XLA where Keras would do so, the loop around it
    never is: as in Keras's own `steps_per_execution`.
    """

    def _begin(self):
        checkpoint.state(self._model)  # makes the optimizer's variables

    def _placed(self, images, labels):
        # A GPU gathers no uint8 outside XLA, and int32 is the host's. A
        # float16 holds every value that a uint8 does.
        if images.dtype == np.uint8:
            images = images.astype(np.float16)
        return tf.constant(images), tf.constant(labels, tf.int64)

    def _take(self, images, labels, rows, count):
        return self._steps(
            images, labels, tf.constant(rows, tf.int64), tf.constant(count)
        ).numpy()

    def _test(self, images, labels, rows):
        return self._tested(
            images, labels, tf.constant(rows, tf.int64), tf.constant(len(rows))
        ).numpy()

    def _compile_steps(self, prepare):
        model = self._model
        prepared = on_device(prepare)

        def step(images, labels):
            with tf.GradientTape() as tape:
                logits = model(prepared(images), training=True)
                loss, accuracy = report(labels, logits, model.losses)
            variables = model.trainable_variables
            model.optimizer.apply(
                tape.gradient(loss, [x.value for x in variables]), variables
            )
            return tf.stack([loss, accuracy])

        self._steps = self._loop(step)

    def _compile_test(self):
        def test(images, labels):
            logits = self._model(images, training=False)
            return tf.stack(report(labels, logits, self._model.losses))

        self._tested = self._loop(test)

    def _loop(self, of_one):
        """Returns the compiled loop of a function of (images, labels)."""

        @tf.function(jit_compile=self._model.jit_compile)
        def gathered(images, labels, rows):
            return of_one(tf.gather(images, rows), tf.gather(labels, rows))

        @tf.function
        def loop(images, labels, rows, count):
            reports = tf.TensorArray(tf.float32, count, element_shape=(2,))
            for number in tf.range(count):
                reports = reports.write(
                    number, gathered(images, labels, rows[number])
                )
            return reports.stack()

        return loop

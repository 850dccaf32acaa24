"""tf-keras 2 and TensorFlow 1's layers, and the settings that mean the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras.api._v1 import keras as tf_keras_v1

from tests.keras_bn import coming_from
from tests.keras_bn import frameworks

CLIPPED = (
    'renorm=True, renorm_clipping={"rmax": 1.5, "rmin": 0.5, "dmax": 0.5}, '
    "renorm_momentum=0.9"
)
THERE = "tf_keras.layers.BatchNormalization"
FUSED = [(f"{THERE}()", "BatchNormalization(unbiased_variance=True)")]
SAME = [
    (f"{THERE}({kwargs})", f"BatchNormalization({kwargs})")
    for kwargs in ("axis=[1, 3]", CLIPPED, "synchronized=True")
]
PLAIN = [
    (f"{THERE}()", "BatchNormalization()"),
    (f"{THERE}(fused=False)", "BatchNormalization()"),
]
GHOST = (
    f"{THERE}(virtual_batch_size=4)",
    "BatchNormalization(virtual_batch_size=4)",
)
TF1 = (
    "tf.compat.v1.layers.batch_normalization(x, training=True)",
    "BatchNormalization(unbiased_variance=True)",
)


class TfKeras:
    def __init__(self, layer, shape):
        self.layer = layer
        layer.build(shape)

    def step(self, batch, output_gradient, mask=None):
        batch = tf.constant(batch)
        if mask is not None:
            mask = tf.constant(mask)
        weights = self.layer.trainable_weights
        with tf.GradientTape() as tape:
            tape.watch(batch)
            outputs = self.layer(batch, training=True, mask=mask)
        of_batch, *of_weights = tape.gradient(
            outputs, [batch, *weights], output_gradient
        )
        for weight, gradient in zip(weights, of_weights):
            weight.assign_sub(coming_from.LEARNING_RATE * gradient)
        return outputs, of_batch, of_weights

    def infer(self, batch):
        return self.layer(tf.constant(batch), training=False)

    def weights(self):
        return self.layer.get_weights()


def _layers(there, here, shape):
    theirs = eval(there, {"tf_keras": tf_keras})
    return TfKeras(theirs, shape), coming_from.ours(here)


def test_the_table_has_these_rows_and_no_others():
    assert coming_from.rows("tf_keras.") == {*FUSED, *PLAIN, *SAME, GHOST}
    assert coming_from.rows("tf.") == {TF1}


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (2, 3, 2, 5, 2)])
@pytest.mark.parametrize("there, here", FUSED)
def test_fused(there, here, shape):
    theirs, ours = _layers(there, here, shape)
    assert theirs.layer.fused
    coming_from.check(theirs, ours, shape)


@pytest.mark.parametrize(
    "there, here, shape",
    [
        (*PLAIN[0], (6, 3)),
        (*PLAIN[0], (4, 5, 3)),
        (*PLAIN[1], (4, 3, 5, 2)),
        *((*pair, (4, 3, 5, 2)) for pair in SAME),
    ],
)
def test_not_fused(there, here, shape):
    theirs, ours = _layers(there, here, shape)
    assert not theirs.layer.fused
    coming_from.check(theirs, ours, shape)


def test_masks():
    """Where the layer is not fused; where it is, tf-keras ignores them."""
    shape = (4, 5, 3)
    mask = np.random.default_rng(0).random(shape[:-1]) < 0.6
    coming_from.check(*_layers(*PLAIN[0], shape), shape, mask)
    theirs, _ = _layers(*FUSED[0], (4, 3, 5, 2))
    batch, mask = np.ones((4, 3, 5, 2), "float32"), np.zeros((4, 3, 5), bool)
    with pytest.warns(UserWarning, match="`mask` will be ignored"):
        theirs.step(batch, batch, mask)
    np.testing.assert_allclose(theirs.weights()[2], 0.01, 1e-5)


def test_ghost_batches():
    """Theirs are interleaved, and enter the moving statistics as one mean."""
    shape, size = (12, 5, 3), 4
    theirs, ours = _layers(*GHOST, shape)
    ours.build(shape)
    theirs.step(coming_from.values(shape, 0), coming_from.values(shape, 1))
    coming_from.carry_weights(theirs, ours)
    batch, gradient = coming_from.values(shape, 2), coming_from.values(shape, 3)
    # Their parts are the samples 0, 3, 6, 9, then 1, 4, 7, 10, and so on.
    order = np.arange(shape[0]).reshape(size, -1).T.ravel()

    class Reordered:
        def step(self, *_):
            outputs, of_batch, of_weights = theirs.step(batch, gradient)
            return outputs.numpy()[order], of_batch.numpy()[order], of_weights

    before = theirs.weights()[2:]
    coming_from.step_beside(Reordered(), ours, batch[order], gradient[order])
    parts = batch[order].astype("float64").reshape(-1, size, *shape[1:])
    moments = (parts.mean((1, 2)), parts.var((1, 2)))
    for past, after, moment in zip(before, theirs.weights()[2:], moments):
        expected = 0.99 * past.ravel() + 0.01 * moment.mean(0)
        np.testing.assert_allclose(after.ravel(), expected, 1e-5)
    for past, statistic, moment in zip(
        before, (ours.moving_mean, ours.moving_variance), moments
    ):
        expected = past.ravel()
        for part in moment:
            expected = 0.99 * expected + 0.01 * part
        np.testing.assert_allclose(frameworks.array(statistic), expected, 1e-5)
    coming_from.carry_weights(theirs, ours)
    coming_from.check_inference(theirs, ours, coming_from.values((7, 5, 3), 5))
    with pytest.raises(tf.errors.InvalidArgumentError):
        theirs.step(batch[:7], gradient[:7])


def test_tensorflow_1(monkeypatch):
    """Moving statistics wait for UPDATE_OPS there; here the call does it."""
    shape = (4, 3, 5, 2)
    batch = coming_from.values(shape, 0)
    # `tf.compat.v1.layers` is this module where TF_USE_LEGACY_KERAS=1.
    layers = tf_keras_v1.__internal__.legacy.layers
    monkeypatch.setattr(tf.compat.v1, "layers", layers)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.constant(batch)
        with pytest.warns(UserWarning, match="deprecated"):
            outputs = eval(TF1[0], {"tf": tf, "x": x})
        variables = tf.compat.v1.global_variables()
        session.run(tf.compat.v1.global_variables_initializer())
        normalized = session.run(outputs)
        moving_mean = session.run(variables)[2]
        np.testing.assert_array_equal(moving_mean, 0.0)
        session.run(
            tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
        )
        weights = session.run(variables)
    ours = coming_from.ours(TF1[1])
    step = frameworks.training_step(ours, keras.ops.convert_to_tensor(batch))
    coming_from.close(step.outputs, normalized, "outputs")
    for found, expected in zip(ours.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected, 1e-5)

"""`audit` of a model whose replicas do, or do not, hold the same values."""

import functools
import os
import subprocess
import sys

import keras
import numpy as np

import keras_bn
from tests.keras_bn import frameworks

# Devices cannot be cut in two once TensorFlow runs, so this has a process of
# its own.
_UNDER_TENSORFLOW = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
from tests.keras_bn.diagnostics import test_audit_replicas as test
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = test.make()
test.check_agreement(model)
first, second = model.layers[0].moving_mean.value.values
for gap, check in test.CHECKS:
    second.assign(first * (1.0 + gap))
    check(model)
"""


def make():
    """A model that was trained, by its weights."""
    model = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization()])
    model.layers[0].set_weights(
        [np.full(3, x, "float32") for x in (1.5, 0.5, 2.0, 3.0)]
    )
    return model


def check_agreement(model):
    assert keras_bn.audit(model).ok


def check_disagreement(model, gap):
    (found,) = keras_bn.audit(model).findings
    assert found.what == "moving_mean differs between replicas"
    np.testing.assert_allclose(found.measured, gap, 1e-2)


# What replicas are apart, in parts of their value, and what is said of it:
# collectives may round a sum in another order on each of them.
CHECKS = [
    (0.0, check_agreement),
    (5e-5, check_agreement),
    (2e-4, functools.partial(check_disagreement, gap=2e-4)),
    (0.25, functools.partial(check_disagreement, gap=0.25)),
]


def test_replicas():
    if frameworks.IS_TENSORFLOW:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(
            [sys.executable, "-c", _UNDER_TENSORFLOW],
            check=True,
            env=environment,
        )
        return
    import jax

    model = make()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("replica",))
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    variable = model.layers[0].moving_mean
    for gap, check in CHECKS:
        copies = [
            jax.device_put(np.full(3, 2.0 + 2.0 * gap * i, "float32"), device)
            for i, device in enumerate(mesh.devices)
        ]
        variable._value = jax.make_array_from_single_device_arrays(
            (3,), same, copies
        )
        check(model)

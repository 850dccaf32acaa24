"""The batch normalization layers that the benchmark times, per framework.

Each framework has a module here with a function `candidates`. It takes the
tensor, the gradient that arrives from above and the name of a precision, and
returns the layers it knows, each as three calls without arguments: `inference`,
`forward` (in training, moving statistics updated) and `forward_backward`
(gradients with respect to the input, gamma and beta besides). Every call hands
back all it computed, so that no compiler can leave any of it out.

The variants of this project's layer and of Keras's, such as the masked one,
have `forward_backward` alone. The synchronized ones divide the batch between
two replicas in one process, whose CPU time is then that of both. PyTorch's are
two processes, which the clock of one does not see, and are left out; Keras's
layer synchronizes on TensorFlow alone.

The peers are set to Keras's own defaults: momentum 0.99 and epsilon 1e-3.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

MOMENTUM = 0.99
EPSILON = 1e-3
OPERATIONS = ("inference", "forward", "forward_backward")
KEPT_SHARE = 0.7
REPLICAS = 2
# The package of each backend, and the peer timed beside Keras on it: the
# peer's name in the results and the package that brings it.
PEERS = {
    "tensorflow": ("tf_keras", "tf_keras"),
    "jax": ("flax", "flax"),
    "torch": ("torch", "torch"),
}


class Candidate(NamedTuple):
    """One layer, ready to be timed.

    Attributes:
        name: `keras_bn`, `keras`, one of their variants, or the peer's name
            from `PEERS`. The variants: `keras_bn_ghost` (four ghost batches),
            and of both layers `_masked` (7 of 10 positions kept),
            `_renorm` and `_sync` (two replicas).
        operations: from each of `OPERATIONS`, or of a variant from
            `forward_backward`, to a call without arguments that runs it to
            the end and returns what it computed.
    """

    name: str
    operations: dict[str, Callable[[], object]]


def candidates(
    backend: str, inputs: np.ndarray, gradient: np.ndarray, dtype: str
) -> list[Candidate]:
    """Builds every layer that can be timed on a backend.

    Args:
        backend: `tensorflow`, `jax` or `torch`; the one Keras runs on.
        inputs: float32 array, channels last, `(batch, ..., channels)`.
        gradient: float32 array of the same shape, the gradient of the loss
            with respect to the layer's output.
        dtype: `float32`, `bfloat16` or `float16`: what the tensors are in.
            Parameters and statistics stay in float32.

    Returns:
        keras_bn's layer, Keras's, the variants of both, and the framework's
        peer if installed. The synchronized ones only where `make_replicas`
        has made two devices.
    """
    module = importlib.import_module(f"{__name__}.{backend}")
    return module.candidates(inputs, gradient, dtype)


def has_peer(backend: str) -> bool:
    """Whether the peer's package of a backend is installed."""
    return find_spec(PEERS[backend][1]) is not None


def make_replicas(backend: str) -> None:
    """Divides the CPU into the devices that synchronized layers run on.

    To be called before the framework is used.
    """
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * REPLICAS,
        )
    elif backend == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", REPLICAS)


def kept_positions(shape: tuple[int, ...]) -> np.ndarray:
    """The mask of the masked layers: the shape without its channels."""
    return np.random.default_rng(1).random(shape[:-1]) < KEPT_SHARE


def policy_of(dtype: str) -> str:
    return dtype if dtype == "float32" else f"mixed_{dtype}"


class Setup(NamedTuple):
    """One layer of Keras, not yet built, and how it is called."""

    layer: object
    operations: tuple[str, ...] = OPERATIONS[-1:]
    mask: np.ndarray | None = None


def keras_setups(dtype: str, shape: tuple[int, ...]) -> dict[str, Setup]:
    """From a candidate's name to its setup, without the synchronized."""
    import keras_bn

    policy = policy_of(dtype)
    ghost_batch = -(-shape[0] // 4)
    found = {
        "keras_bn_ghost": Setup(
            keras_bn.BatchNormalization(
                dtype=policy, virtual_batch_size=ghost_batch
            )
        )
    }
    mask = kept_positions(shape)
    for name, layer_class in keras_layer_classes().items():
        found[name] = Setup(layer_class(dtype=policy), OPERATIONS)
        found[f"{name}_masked"] = Setup(layer_class(dtype=policy), mask=mask)
        found[f"{name}_renorm"] = Setup(layer_class(dtype=policy, renorm=True))
    return found


def keras_layer_classes() -> dict:
    import keras

    import keras_bn

    return {
        "keras_bn": keras_bn.BatchNormalization,
        "keras": keras.layers.BatchNormalization,
    }

"""The batch normalization layers that the benchmark times, per framework.

Each framework has one function here. It takes the tensor, the gradient that
arrives from above and the name of a precision, and returns the layers it
knows, each as three calls without arguments: `inference`, `forward` (in
training, moving statistics updated) and `forward_backward` (gradients with
respect to the input, gamma and beta besides). Every call hands back all it
computed, so that no compiler can leave any of it out.

The peers are set to Keras's own defaults: momentum 0.99 and epsilon 1e-3.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

MOMENTUM = 0.99
EPSILON = 1e-3
OPERATIONS = ("inference", "forward", "forward_backward")
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
        name: `keras_bn`, `keras_bn_ghost` (four ghost batches), `keras`, or
            the peer's name from `PEERS`.
        operations: from each of `OPERATIONS` to a call without arguments
            that runs it to the end and returns what it computed.
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
        keras_bn's layer, the same with ghost batches, Keras's, and the
        framework's peer if installed.
    """
    build = {
        "tensorflow": _tensorflow_candidates,
        "jax": _jax_candidates,
        "torch": _torch_candidates,
    }[backend]
    return build(inputs, gradient, dtype)


def has_peer(backend: str) -> bool:
    """Whether the peer's package of a backend is installed."""
    return find_spec(PEERS[backend][1]) is not None


def _policy(dtype: str) -> str:
    return dtype if dtype == "float32" else f"mixed_{dtype}"


def _keras_layers(dtype: str, batch: int) -> dict:
    import keras

    import keras_bn

    return {
        "keras_bn": keras_bn.BatchNormalization(dtype=_policy(dtype)),
        "keras_bn_ghost": keras_bn.BatchNormalization(
            dtype=_policy(dtype), virtual_batch_size=-(-batch // 4)
        ),
        "keras": keras.layers.BatchNormalization(dtype=_policy(dtype)),
    }


def _tensorflow_candidates(inputs, gradient, dtype) -> list[Candidate]:
    import tensorflow as tf

    layers = _keras_layers(dtype, len(inputs))
    if has_peer("tensorflow"):
        import tf_keras

        layers["tf_keras"] = tf_keras.layers.BatchNormalization(
            dtype=_policy(dtype)
        )
    x = tf.cast(inputs, dtype)
    dy = tf.cast(gradient, dtype)

    def operations(layer) -> dict:
        layer.build(x.shape)

        # Keras's jit_compile="auto" means no XLA on a CPU.
        @tf.function(jit_compile=False)
        def inference(x):
            return layer(x, training=False)

        @tf.function(jit_compile=False)
        def forward(x):
            return layer(x, training=True)

        @tf.function(jit_compile=False)
        def forward_backward(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            leaves = [x, layer.gamma, layer.beta]
            return y, tape.gradient(y, leaves, output_gradients=dy)

        return {
            "inference": lambda: inference(x),
            "forward": lambda: forward(x),
            "forward_backward": lambda: forward_backward(x, dy),
        }

    return [Candidate(name, operations(layers[name])) for name in layers]


def _jax_candidates(inputs, gradient, dtype) -> list[Candidate]:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(inputs, dtype)
    dy = jnp.asarray(gradient, dtype)

    def operations(apply, parameters, statistics) -> dict:
        """Jits a function (parameters, statistics, x, training) -> pair."""

        @jax.jit
        def inference(parameters, statistics, x):
            return apply(parameters, statistics, x, False)[0]

        @jax.jit
        def forward(parameters, statistics, x):
            return apply(parameters, statistics, x, True)

        @jax.jit
        def forward_backward(parameters, statistics, x, dy):
            y, pullback, updated = jax.vjp(
                lambda parameters, x: apply(parameters, statistics, x, True),
                parameters,
                x,
                has_aux=True,
            )
            return y, updated, pullback(dy)

        state = (parameters, statistics, x)
        wait = jax.block_until_ready
        return {
            "inference": lambda: wait(inference(*state)),
            "forward": lambda: wait(forward(*state)),
            "forward_backward": lambda: wait(forward_backward(*state, dy)),
        }

    def keras_operations(layer) -> dict:
        layer.build(x.shape)

        def apply(parameters, statistics, x, training):
            return layer.stateless_call(
                parameters, statistics, x, training=training
            )

        return operations(
            apply,
            [variable.value for variable in layer.trainable_variables],
            [variable.value for variable in layer.non_trainable_variables],
        )

    def flax_operations() -> dict:
        from flax import linen

        module = linen.BatchNorm(
            momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype
        )
        variables = module.init(jax.random.key(0), x, use_running_average=False)

        def apply(parameters, statistics, x, training):
            y, updated = module.apply(
                {"params": parameters, "batch_stats": statistics},
                x,
                use_running_average=not training,
                mutable=["batch_stats"],
            )
            return y, updated["batch_stats"]

        return operations(apply, variables["params"], variables["batch_stats"])

    found = [
        Candidate(name, keras_operations(layer))
        for name, layer in _keras_layers(dtype, len(inputs)).items()
    ]
    if has_peer("jax"):
        found.append(Candidate("flax", flax_operations()))
    return found


def _torch_candidates(inputs, gradient, dtype) -> list[Candidate]:
    import torch

    channels_last = torch.from_numpy(inputs).to(getattr(torch, dtype))
    dy_channels_last = torch.from_numpy(gradient).to(channels_last.dtype)

    def operations(call, x, dy, gamma, beta) -> dict:
        x = x.detach().requires_grad_()

        def inference():
            with torch.no_grad():
                return call(x, False)

        def forward_backward():
            y = call(x, True)
            return y, torch.autograd.grad(y, [x, gamma, beta], dy)

        return {
            "inference": inference,
            "forward": lambda: call(x, True),
            "forward_backward": forward_backward,
        }

    def keras_operations(layer) -> dict:
        layer.build(tuple(inputs.shape))
        return operations(
            lambda x, training: layer(x, training=training),
            channels_last,
            dy_channels_last,
            layer.gamma.value,
            layer.beta.value,
        )

    def torch_operations() -> dict:
        # Channels second in the shape, last in memory: PyTorch's
        # channels-last format, a view of the same tensor.
        rank = inputs.ndim
        layer_class = {
            2: torch.nn.BatchNorm1d,
            3: torch.nn.BatchNorm1d,
            4: torch.nn.BatchNorm2d,
            5: torch.nn.BatchNorm3d,
        }[rank]
        layer = layer_class(
            inputs.shape[-1], eps=EPSILON, momentum=1 - MOMENTUM
        )

        def call(x, training):
            return layer.train(training)(x)

        return operations(
            call,
            channels_last.movedim(-1, 1),
            dy_channels_last.movedim(-1, 1),
            layer.weight,
            layer.bias,
        )

    found = [
        Candidate(name, keras_operations(layer))
        for name, layer in _keras_layers(dtype, len(inputs)).items()
    ]
    found.append(Candidate("torch", torch_operations()))
    return found

"""The batch normalization layers that the benchmark times, per framework.

Each framework has one function here. It takes the tensor, the gradient that
arrives from above and the name of a precision, and returns the layers it
knows, each as three calls without arguments: `inference`, `forward` (in
training, moving statistics updated) and `forward_backward` (gradients with
respect to the input, gamma and beta besides). Every call hands back all it
computed, so that no compiler can leave any of it out.

The variants of this project's layer and of Keras's, such as the masked one,
have `forward_backward` alone. The synchronized ones divide the batch between
two replicas in one process, whose CPU time is then that of both; PyTorch's are
two processes, which the clock of one does not see, and are left out.

The peers are set to Keras's own defaults: momentum 0.99 and epsilon 1e-3.
"""

import functools
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
    build = {
        "tensorflow": _tensorflow_candidates,
        "jax": _jax_candidates,
        "torch": _torch_candidates,
    }[backend]
    return build(inputs, gradient, dtype)


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


def kept_positions(shape: tuple[int, ...]) -> np.ndarray:
    """The mask of the masked layers: the shape without its channels."""
    return np.random.default_rng(1).random(shape[:-1]) < KEPT_SHARE


def _policy(dtype: str) -> str:
    return dtype if dtype == "float32" else f"mixed_{dtype}"


class _Setup(NamedTuple):
    """One layer of Keras, not yet built, and how it is called."""

    layer: object
    operations: tuple[str, ...] = OPERATIONS[-1:]
    mask: np.ndarray | None = None


def _keras_setups(dtype: str, shape: tuple[int, ...]) -> dict[str, _Setup]:
    """From a candidate's name to its setup, without the synchronized."""
    import keras_bn

    policy = _policy(dtype)
    ghost_batch = -(-shape[0] // 4)
    found = {
        "keras_bn_ghost": _Setup(
            keras_bn.BatchNormalization(
                dtype=policy, virtual_batch_size=ghost_batch
            )
        )
    }
    mask = kept_positions(shape)
    for name, layer_class in _keras_layer_classes().items():
        found[name] = _Setup(layer_class(dtype=policy), OPERATIONS)
        found[f"{name}_masked"] = _Setup(layer_class(dtype=policy), mask=mask)
        found[f"{name}_renorm"] = _Setup(
            layer_class(dtype=policy, renorm=True)
        )
    return found


def _keras_layer_classes() -> dict:
    import keras

    import keras_bn

    return {
        "keras_bn": keras_bn.BatchNormalization,
        "keras": keras.layers.BatchNormalization,
    }


def _tensorflow_candidates(inputs, gradient, dtype) -> list[Candidate]:
    import tensorflow as tf

    setups = _keras_setups(dtype, inputs.shape)
    if has_peer("tensorflow"):
        import tf_keras

        setups["tf_keras"] = _Setup(
            tf_keras.layers.BatchNormalization(dtype=_policy(dtype)), OPERATIONS
        )
    x = tf.cast(inputs, dtype)
    dy = tf.cast(gradient, dtype)

    def forward_backward_of(layer, x, dy, **mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **mask)
        leaves = [x, layer.gamma, layer.beta]
        return y, tape.gradient(y, leaves, output_gradients=dy)

    def operations(layer, names, mask) -> dict:
        layer.build(x.shape)
        masks = {} if mask is None else {"mask": tf.constant(mask)}

        # Keras's jit_compile="auto" means no XLA on a CPU.
        @tf.function(jit_compile=False)
        def inference(x):
            return layer(x, training=False)

        @tf.function(jit_compile=False)
        def forward(x):
            return layer(x, training=True)

        @tf.function(jit_compile=False)
        def forward_backward(x, dy, **masks):
            return forward_backward_of(layer, x, dy, **masks)

        calls = {
            "inference": lambda: inference(x),
            "forward": lambda: forward(x),
            "forward_backward": lambda: forward_backward(x, dy, **masks),
        }
        return {name: calls[name] for name in names}

    def synchronized_operations(layer_class) -> dict:
        with strategy.scope():
            layer = layer_class(dtype=_policy(dtype), synchronized=True)
            layer.build(x.shape)

        @tf.function(jit_compile=False)
        def forward_backward(x, dy):
            return strategy.run(
                lambda x, dy: forward_backward_of(layer, x, dy), (x, dy)
            )

        def divided(tensor):
            parts = tf.split(tensor, [len(x) // 2, len(x) - len(x) // 2])
            return strategy.experimental_distribute_values_from_function(
                lambda context: parts[context.replica_id_in_sync_group]
            )

        shards = divided(x), divided(dy)
        return {"forward_backward": lambda: forward_backward(*shards)}

    found = [
        Candidate(name, operations(*setup))
        for name, setup in setups.items()
    ]
    strategy = _mirrored_strategy()
    if strategy is not None and len(x) >= REPLICAS:
        found += [
            Candidate(
                f"{name}_sync", synchronized_operations(layer_class)
            )
            for name, layer_class in _keras_layer_classes().items()
        ]
    return found


@functools.cache
def _mirrored_strategy():
    """Over the devices of `make_replicas`; None without them.

    The collectives of a second strategy would meet those of the first.
    """
    import tensorflow as tf

    devices = tf.config.list_logical_devices("CPU")
    if len(devices) < REPLICAS:
        return None
    return tf.distribute.MirroredStrategy([d.name for d in devices])


def _jax_candidates(inputs, gradient, dtype) -> list[Candidate]:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(inputs, dtype)
    dy = jnp.asarray(gradient, dtype)

    def operations(
        apply, parameters, statistics, names=OPERATIONS, mask=None
    ) -> dict:
        """Jits `(parameters, statistics, x, training[, mask])` -> pair."""
        masks = () if mask is None else (jnp.asarray(mask),)

        @jax.jit
        def inference(parameters, statistics, x):
            return apply(parameters, statistics, x, False)[0]

        @jax.jit
        def forward(parameters, statistics, x):
            return apply(parameters, statistics, x, True)

        @jax.jit
        def forward_backward(parameters, statistics, x, dy, *masks):
            y, pullback, updated = jax.vjp(
                lambda parameters, x: apply(
                    parameters, statistics, x, True, *masks
                ),
                parameters,
                x,
                has_aux=True,
            )
            return y, updated, pullback(dy)

        state = (parameters, statistics, x)
        wait = jax.block_until_ready
        calls = {
            "inference": lambda: wait(inference(*state)),
            "forward": lambda: wait(forward(*state)),
            "forward_backward": lambda: wait(
                forward_backward(*state, dy, *masks)
            ),
        }
        return {name: calls[name] for name in names}

    def keras_operations(layer, names, mask) -> dict:
        layer.build(x.shape)

        def apply(parameters, statistics, x, training, mask=None):
            return layer.stateless_call(
                parameters, statistics, x, training=training, mask=mask
            )

        return operations(
            apply,
            [variable.value for variable in layer.trainable_variables],
            [variable.value for variable in layer.non_trainable_variables],
            names,
            mask,
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
        Candidate(name, keras_operations(*setup))
        for name, setup in _keras_setups(dtype, inputs.shape).items()
    ]
    if has_peer("jax"):
        found.append(Candidate("flax", flax_operations()))
    return found


def _torch_candidates(inputs, gradient, dtype) -> list[Candidate]:
    import torch

    channels_last = torch.from_numpy(inputs).to(getattr(torch, dtype))
    dy_channels_last = torch.from_numpy(gradient).to(channels_last.dtype)

    def operations(call, x, dy, gamma, beta, names=OPERATIONS) -> dict:
        x = x.detach().requires_grad_()

        def inference():
            with torch.no_grad():
                return call(x, False)

        def forward_backward():
            y = call(x, True)
            return y, torch.autograd.grad(y, [x, gamma, beta], dy)

        calls = {
            "inference": inference,
            "forward": lambda: call(x, True),
            "forward_backward": forward_backward,
        }
        return {name: calls[name] for name in names}

    def keras_operations(layer, names, mask) -> dict:
        layer.build(tuple(inputs.shape))
        masks = {} if mask is None else {"mask": torch.from_numpy(mask)}
        return operations(
            lambda x, training: layer(x, training=training, **masks),
            channels_last,
            dy_channels_last,
            layer.gamma.value,
            layer.beta.value,
            names,
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
        Candidate(name, keras_operations(*setup))
        for name, setup in _keras_setups(dtype, inputs.shape).items()
    ]
    found.append(Candidate("torch", torch_operations()))
    return found

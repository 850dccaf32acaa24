"""The layers on TensorFlow."""

import functools

import tensorflow as tf

from experiments.benchmark_candidates import OPERATIONS
from experiments.benchmark_candidates import REPLICAS
from experiments.benchmark_candidates import Candidate
from experiments.benchmark_candidates import Setup
from experiments.benchmark_candidates import has_peer
from experiments.benchmark_candidates import keras_layer_classes
from experiments.benchmark_candidates import keras_setups
from experiments.benchmark_candidates import policy_of


def candidates(inputs, gradient, dtype) -> list[Candidate]:
    setups = keras_setups(dtype, inputs.shape)
    if has_peer("tensorflow"):
        import tf_keras

        setups["tf_keras"] = Setup(
            tf_keras.layers.BatchNormalization(dtype=policy_of(dtype)),
            OPERATIONS,
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
            layer = layer_class(dtype=policy_of(dtype), synchronized=True)
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
        Candidate(name, operations(*setup)) for name, setup in setups.items()
    ]
    strategy = _mirrored_strategy()
    if strategy is not None and len(x) >= REPLICAS:
        found += [
            Candidate(f"{name}_sync", synchronized_operations(layer_class))
            for name, layer_class in keras_layer_classes().items()
        ]
    return found


@functools.cache
def _mirrored_strategy():
    """Over the devices of `make_replicas`; None without them.

    The collectives of a second strategy would meet those of the first.
    """
    devices = tf.config.list_logical_devices("CPU")
    if len(devices) < REPLICAS:
        return None
    return tf.distribute.MirroredStrategy([d.name for d in devices])

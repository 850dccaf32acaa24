"""`StatisticsMonitor` in two processes that train a model together."""

import os
import sys

import keras
import numpy as np

import keras_bn
from tests.keras_bn import replicas

# More than the checks are apart, so that points are drawn between epochs.
STEPS, EVERY = 7, 3


def _model():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras_bn.BatchNormalization(name="watched"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    return model


def _data():
    generator = np.random.default_rng(0)
    values = generator.standard_normal((8 * STEPS, 3), "float32")
    return values, values[:, :1]


def _fit(monitor):
    _model().fit(
        *_data(), batch_size=8, shuffle=False, verbose=0, callbacks=[monitor]
    )


def _on_jax(monitor, address, rank):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(address, 2, rank)
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
    _fit(monitor)


def _on_torch(monitor, address, rank):
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"tcp://{address}", rank=rank, world_size=2
    )
    _fit(monitor)
    distributed.destroy_process_group()


def _on_tensorflow(monitor, address, rank):
    """By hand: Keras 3's `fit` fails under this strategy."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = _model()

    @tf.function
    def step(values, labels):
        def on_replica(values, labels):
            with tf.GradientTape() as tape:
                outputs = model(values, training=True)
                loss = tf.reduce_mean(tf.square(outputs - labels))
            weights = model.trainable_variables
            gradients = tape.gradient(loss, [w.value for w in weights])
            model.optimizer.apply(gradients, weights)

        strategy.run(on_replica, args=(values, labels))

    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    for number in range(STEPS):
        rows = slice(8 * number + 4 * rank, 8 * number + 4 * rank + 4)
        monitor.on_train_batch_begin(number)
        step(*(tf.constant(x[rows]) for x in _data()))
    monitor.on_epoch_end(0)
    monitor.on_train_end()


def test_the_first_process_writes(tmp_path):
    replicas.run([__name__, str(tmp_path)], 2, 2)
    for run in ("moving", "batch"):
        assert len(os.listdir(tmp_path / run)) == 1


def main(log_dir, rank):
    train = globals()[f"_on_{keras.backend.backend()}"]
    monitor = keras_bn.StatisticsMonitor(log_dir=log_dir, every=EVERY)
    train(monitor, os.environ["COORDINATOR"], int(rank))


if __name__ == "__main__":
    main(*sys.argv[1:])

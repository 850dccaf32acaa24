"""The article's TensorFlow 1 program: a graph, a session, `tf.layers`.

It runs on TensorFlow 2 through tf-keras, in a process whose environment says
TF_USE_LEGACY_KERAS=1.
"""

from collections.abc import Callable

import numpy as np

from experiments import data
from experiments.evaluation import EVALUATION_BATCH
from experiments.run_settings import Settings

# From the names that `tf.layers` gives in the article's network to those of
# `experiments.models`.
SCOPES = {
    "conv2d": "conv1",
    "batch_normalization": "batch_norm_conv1",
    "conv2d_1": "conv2",
    "batch_normalization_1": "batch_norm_conv2",
    "dense": "dense",
    "batch_normalization_2": "batch_norm_dense",
    "dense_1": "logits",
}


def train(
    settings: Settings,
    batches: data.Batches,
    updates: str,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    on_step: Callable[[], None],
) -> tuple[dict[str, np.ndarray], float]:
    """Trains the article's network with both kinds of batch normalization.

    Args:
        settings: of the run.
        batches: what to train on.
        updates: "without" the article's two lines, with them
            ("control_dependencies"), or with `sess.run` of the collection
            after each step ("session_run").
        test_images: uint8 (images, 32, 32, 3).
        test_labels: int32 (images,).
        on_step: called after each step.

    Returns:
        The variables of the network, from the names that TensorFlow gave
        them, and the test accuracy in the session.
    """
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(settings.seed)
        x = tf.placeholder(tf.float32, [None, 32, 32, 3], name="x")
        y = tf.placeholder(tf.int32, [None], name="y")
        is_training = tf.placeholder(tf.bool, name="is_training")
        logits = _network(tf, x, is_training)
        weights = {v.op.name: v for v in tf.global_variables()}
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels=y, logits=logits
            )
        )
        optimizer = tf.train.AdamOptimizer(settings.learning_rate)
        extra_update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        if updates == "control_dependencies":
            with tf.control_dependencies(extra_update_ops):
                train_op = optimizer.minimize(loss)
        else:
            train_op = optimizer.minimize(loss)
        predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
        session.run(tf.global_variables_initializer())
        for number in range(settings.steps):
            images, labels = batches[number]
            feed = {x: images, y: labels, is_training: True}
            session.run(train_op, feed)
            if updates == "session_run":
                session.run(extra_update_ops, feed)
            on_step()
        right = 0
        for start in range(0, len(test_labels), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            feed = {x: test_images[rows], is_training: False}
            right += np.sum(session.run(predicted, feed) == test_labels[rows])
        return session.run(weights), float(right / len(test_labels))


def move(values: dict[str, np.ndarray], model) -> None:
    """Gives the network of `experiments.models` the values of variables.

    Args:
        values: as `train` returns them.
        model: a `keras.Model`, condition 9.
    """
    for name, value in values.items():
        scope, weight = name.split("/")
        layer = model.get_layer(SCOPES[scope])
        getattr(layer, weight).assign(value)


def _network(tf, x, is_training):
    def normalized(x):
        return tf.layers.batch_normalization(x, training=is_training)

    for filters in (32, 64):
        x = tf.layers.conv2d(
            inputs=x,
            filters=filters,
            kernel_size=[5, 5],
            padding="same",
            activation=tf.nn.relu,
        )
        x = normalized(x)
        x = tf.layers.max_pooling2d(inputs=x, pool_size=[2, 2], strides=2)
    x = tf.reshape(x, [-1, 4096])
    x = tf.layers.dense(inputs=x, units=1024, activation=tf.nn.relu)
    return tf.layers.dense(inputs=normalized(x), units=10)

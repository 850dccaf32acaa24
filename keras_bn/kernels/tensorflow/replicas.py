"""Replicas in TensorFlow: those of the `tf.distribute` strategy that runs."""

import threading

import tensorflow as tf


class Replicas:
    """The replicas in sync with the one whose code runs.

    Args:
        context: its `tf.distribute.ReplicaContext`.
    """

    def __init__(self, context):
        self._context = context

    def total(self, x):
        """The sum over replicas, of a tensor of any shape."""
        return self._context.all_reduce(tf.distribute.ReduceOp.SUM, x)

    def gather(self, row):
        """The rows of all replicas, `(replicas, n)`, from each one's `(n,)`."""
        index = self._context.replica_id_in_sync_group
        number = self._context.num_replicas_in_sync
        # The sum of tables with one row filled in is the whole table.
        is_mine = tf.range(number)[:, None] == index
        return self.total(tf.where(is_mine, row, tf.zeros([], row.dtype)))


def find_replicas(axis_name, synchronized, state):
    """The replicas that the caller is one of, or None.

    `tf.distribute` runs the same code on all of them, so that they are found
    whether or not moments are `synchronized`. But inside of a `tf.cond`, a loop
    or another `tf.function` MirroredStrategy lets them send nothing; there, who
    did not ask for it goes on alone.
    """
    del axis_name, state
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    if not synchronized and not _can_send():
        return None
    return Replicas(context)


def _can_send():
    """Whether the graph being built is the one that the replica began with."""
    # Its thread remembers it. Other strategies have none.
    begun = getattr(threading.current_thread(), "graph", None)
    return begun is None or begun is tf.compat.v1.get_default_graph()


def merge(replicas, mean, variance, count):
    """The moments of all replicas' positions, exactly (Chan et al., 1983)."""
    channels = mean.shape[0]
    # Without a mask one number counts for all channels.
    count = tf.reshape(tf.cast(count, mean.dtype), [-1])
    row = tf.concat([mean, variance, count], axis=0)
    table = replicas.gather(row)
    means, variances, counts = tf.split(
        table, [channels, channels, row.shape[0] - 2 * channels], axis=1
    )
    count = tf.reduce_sum(counts, 0)
    share = counts / tf.maximum(count, 1.0)
    mean = tf.reduce_sum(share * means, 0)
    mean += tf.reduce_sum(share * (means - mean), 0)
    variance = tf.reduce_sum(share * (variances + tf.square(means - mean)), 0)
    return mean, variance, count

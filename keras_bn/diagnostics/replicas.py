"""The copies of a variable that the replicas of a model hold."""

import keras
import numpy as np


def disagreement(variable):
    """The largest difference between copies, in parts of the largest value.

    Copies are those of `tf.distribute`, and the shards of an array on JAX that
    hold the same part. PyTorch's are in other processes, out of sight.
    """
    largest = 0.0
    for copies in _copies(variable):
        first, *others = (np.asarray(x, "float64") for x in copies)
        scale = max(np.max(np.abs(first), initial=0.0), 1e-30)
        for other in others:
            if not np.array_equal(first, other, equal_nan=True):
                gap = np.max(np.abs(first - other)) / scale
                largest = max(largest, float(gap) if gap == gap else np.inf)
    return largest


def _copies(variable):
    """List of lists of arrays that are to be the same."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _copies_of_tf_distribute(variable)
    if backend == "jax":
        return _copies_of_jax(variable)
    return []


def _copies_of_tf_distribute(variable):
    import tensorflow as tf

    value = variable.value
    if not isinstance(value, tf.distribute.DistributedValues):
        return []
    return [[x.numpy() for x in value.values]]


def _copies_of_jax(variable):
    shards = getattr(variable.value, "addressable_shards", [])
    parts = {}
    if len(shards) > 1:
        for shard in shards:
            parts.setdefault(str(shard.index), []).append(shard.data)
    return list(parts.values())

"""How the TensorFlow kernels see a tensor of any rank and channel axis."""

import math

import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

# Up to this many elements the fused op spends more on waking its threads than
# on the arithmetic, and plain ops on one thread are cheaper, in low precision
# too, where they work on a float32 copy (of half a megabyte at most).
_SMALL = 2**17

# What a size that the graph does not know, as the batch's, is taken for. A
# `tf.cond` on the true size would stay in every exported model.
_UNKNOWN_SIZE = 64


def moments_type(dtype):
    """float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def along(axis, vector, rank):
    """`vector` in a shape that broadcasts along `axis` of `rank` axes."""
    if axis == rank - 1:
        return vector
    return tf.reshape(vector, [-1] + [1] * (rank - 1 - axis))


def positions(x, channels):
    """How many positions each channel has: an int where the shape is known."""
    if x.shape.is_fully_defined():
        return x.shape.num_elements() // max(channels, 1)
    return tf.cast(tf.size(x) // max(channels, 1), moments_type(x.dtype))


def divisor(count):
    """`count`, or 1 where nothing was counted."""
    return max(count, 1) if isinstance(count, int) else tf.maximum(count, 1.0)


def has_gpu():
    """Whether TensorFlow may place the kernels on a GPU."""
    return bool(tf.config.get_visible_devices("GPU"))


def is_for_xla():
    """Whether the graph being built is one for XLA to compile."""
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def has_tangents(*tensors):
    """Whether a `tf.autodiff.ForwardAccumulator` looks at one of them.

    It goes through the operations of a custom gradient's function, and does
    not ask for the gradient.
    """
    return bool(pack_tangents(tensors).tangents)


def needs_plain_ops(inputs):
    """Whether the fused op is absent, inexact, or without a derivative.

    Forward mode asks for that of its moments, which it does not have.
    """
    return inputs.dtype == tf.float64 or is_for_xla() or has_tangents(inputs)


def is_small(inputs):
    """Whether plain ops are cheaper here than the fused one."""
    if has_gpu():
        return False
    sizes = [_UNKNOWN_SIZE if n is None else n for n in inputs.shape.as_list()]
    return math.prod(sizes) <= _SMALL


def channels_last(x, axis):
    """A view of `x` as `[a, b, 1, channels]`, the layout the op is fast at.

    On a GPU `a` is the batch: cuDNN refuses more than 880,801 there.
    """
    if axis != x.shape.rank - 1:
        x = tf.transpose(x, _to_last(axis, x.shape.rank))
    *sizes, channels = x.shape.as_list()
    if has_gpu():
        # No dimension is left to be inferred: a batch may be empty.
        batch, *area = [
            tf.shape(x)[i] if n is None else n for i, n in enumerate(sizes)
        ]
        return tf.reshape(x, [batch, math.prod(area), 1, channels])
    width = _width(sizes, channels, x.dtype)
    if None in sizes:
        return tf.reshape(x, [-1, width, 1, channels])
    return tf.reshape(x, [math.prod(sizes) // width, width, 1, channels])


def undo_channels_last(x, like, axis):
    """From the view back to the shape of `like`."""
    rank = like.shape.rank
    if like.shape.is_fully_defined():
        shape = like.shape.as_list()
    else:
        shape = tf.shape(like)
    if axis == rank - 1:
        return tf.reshape(x, shape)
    order = _to_last(axis, rank)
    shape = [shape[i] for i in order]
    back = sorted(range(rank), key=order.__getitem__)
    return tf.transpose(tf.reshape(x, shape), back)


def _to_last(axis, rank):
    return [i for i in range(rank) if i != axis] + [axis]


def _width(sizes, channels, dtype):
    """The second dimension of the view, a divisor of the known sizes.

    The op splits its work along the first. With a single column it takes
    another way, which is the faster one for wide float32 rows only (measured,
    see BUILD_NOTES.md).
    """
    if dtype == tf.float32 and 192 <= channels <= 512:
        return 1
    known = math.prod(n for n in sizes if n is not None)
    return math.gcd(known, 8) if known else 1

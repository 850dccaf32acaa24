"""Parts of a batch, each normalized with its own moments, on TensorFlow."""

import tensorflow as tf

from keras_bn.kernels.tensorflow import fused
from keras_bn.kernels.tensorflow.views import channels_last
from keras_bn.kernels.tensorflow.views import is_for_xla
from keras_bn.kernels.tensorflow.views import is_small
from keras_bn.kernels.tensorflow.views import moments_type
from keras_bn.kernels.tensorflow.views import positions
from keras_bn.kernels.tensorflow.views import undo_channels_last

# Parts up to which a loop of known length is written out in the graph.
_UNROLLED = 16


def normalize(inputs, gamma, beta, *, axis, epsilon, size):
    """With the fused op in a loop, on a CPU.

    A part is a view, and what the loops write is put together by one copy
    forward and one backward.

    Returns:
        `(outputs, means, variances, counts)`, the last three with a row for
        each part.
    """
    channels = inputs.shape[axis]
    vector = tf.TensorShape([channels])

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        def forward(x):
            outputs, mean, variance, *_ = fused.normalize_once(
                channels_last(x, axis), gamma, beta, epsilon, is_small(x)
            )
            count = tf.cast(positions(x, channels), tf.float32)
            outputs = undo_channels_last(outputs, x, axis)
            return outputs, mean, variance, tf.reshape(count, [1])

        part = tf.TensorShape([None, *inputs.shape[1:]])
        shapes = part, vector, vector, tf.TensorShape([1])
        dtypes = inputs.dtype, tf.float32, tf.float32, tf.float32
        outputs, *moments = _for_each_part(
            forward, size, [inputs], shapes, dtypes
        )
        outputs.set_shape(inputs.shape)
        means, variances, counts = (
            tf.reshape(m, [-1, width])
            for m, width in zip(moments, (channels, channels, 1))
        )

        def gradient(output_gradient, *_):
            def backward(number, x, dy):
                saved = means[number], variances[number], tf.zeros([])
                return fused.gradients(dy, x, gamma, saved, axis, epsilon)

            of_inputs, *of_vectors = _for_each_part(
                backward,
                size,
                [inputs, output_gradient],
                (part, vector, vector),
                (inputs.dtype, tf.float32, tf.float32),
                numbered=True,
            )
            of_inputs.set_shape(inputs.shape)
            return of_inputs, *(
                tf.reduce_sum(tf.reshape(v, [-1, channels]), 0)
                for v in of_vectors
            )

        return (outputs, means, variances, counts), gradient

    return normalize(inputs, gamma, beta)


def _for_each_part(function, size, tensors, shapes, dtypes, numbered=False):
    """Calls `function` on parts of the tensors, and joins what it returns."""
    batch = _sizes(tensors[0])[0]
    # An empty batch is one part.
    parts = (max if isinstance(batch, int) else tf.maximum)(
        -(-batch // size), 1
    )

    def results_of(number):
        rows = [x[number * size : (number + 1) * size] for x in tensors]
        return function(number, *rows) if numbered else function(*rows)

    if isinstance(parts, int) and parts <= _UNROLLED:
        results = zip(*(results_of(number) for number in range(parts)))
        return [tf.concat(r, 0) for r in results]

    def body(number, *arrays):
        results = results_of(number)
        return number + 1, *(
            a.write(number, r) for a, r in zip(arrays, results)
        )

    arrays = [
        tf.TensorArray(d, parts, infer_shape=False, element_shape=s)
        for d, s in zip(dtypes, shapes)
    ]
    _, *arrays = tf.while_loop(
        lambda number, *_: number < parts, body, [0, *arrays]
    )
    return [array.concat() for array in arrays]


def map_normalize(
    normalize_batch,
    inputs,
    gamma,
    beta,
    *,
    axis,
    epsilon,
    size,
    mask=None,
):
    """With `normalize_batch` for each part, whatever it does."""
    dtype = moments_type(inputs.dtype)
    channels = inputs.shape[axis]
    if mask is not None:
        mask = tf.broadcast_to(
            mask, tf.concat([tf.shape(inputs)[:1], tf.shape(mask)[1:]], 0)
        )

    def normalize(inputs, mask=None):
        outputs, mean, variance, count = normalize_batch(
            inputs, gamma, beta, axis=axis, epsilon=epsilon, mask=mask
        )
        count = tf.broadcast_to(tf.cast(count, dtype), [channels])
        return outputs, mean, variance, count

    batch = _sizes(inputs)[0]
    tensors = [inputs] if mask is None else [inputs, mask]
    if isinstance(batch, int) and batch < size:
        outputs, *moments = normalize(*tensors)
        return outputs, *(moment[None] for moment in moments)
    rest = batch % size
    # A split is no copy, and the gradient of one is a single copy.
    halves = [tf.split(t, [batch - rest, rest]) for t in tensors]
    wholes, rests = zip(*halves)
    # XLA has no loop of no parts: one of zeros, that counts for nothing.
    padded = not isinstance(batch, int) and is_for_xla()
    if padded:
        none = tf.cast(batch < size, tf.int32)
        wholes = [
            tf.pad(t, [[0, none * size]] + [[0, 0]] * (t.shape.rank - 1))
            for t in wholes
        ]
    wholes = tuple(tf.reshape(t, [-1, size, *_sizes(t)[1:]]) for t in wholes)
    vector = tf.TensorSpec([channels], dtype)
    outputs, *moments = tf.map_fn(
        lambda rows: normalize(*rows),
        wholes,
        fn_output_signature=(
            tf.TensorSpec([size, *inputs.shape[1:]], inputs.dtype),
            vector,
            vector,
            vector,
        ),
    )
    outputs = tf.reshape(outputs, [-1, *_sizes(inputs)[1:]])
    if isinstance(rest, int) and not rest and batch:
        return outputs, *moments
    if padded:
        outputs = outputs[: batch - rest]
        moments[2] *= tf.cast(1 - none, dtype)
    last = normalize(*rests)
    outputs = tf.concat([outputs, last[0]], 0)
    return tf.ensure_shape(outputs, inputs.shape), *(
        tf.concat([several, one[None]], 0)
        for several, one in zip(moments, last[1:])
    )


def _sizes(tensor):
    """The sizes of a tensor: ints where they are known."""
    sizes = tf.shape(tensor)
    return [sizes[i] if n is None else n for i, n in enumerate(tensor.shape)]

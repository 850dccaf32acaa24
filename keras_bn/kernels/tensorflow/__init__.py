"""TensorFlow kernels, on the fused op that Keras 3 no longer uses.

`fused.py` is the road of a plain batch. float64 has no fused kernel, and XLA
makes E[x^2] - E[x]^2 of it; there, and for masked and synchronized batches, the
same steps are taken with moments found on their own and a gradient in plain ops
(`plain.py`).
"""

import tensorflow as tf

from keras_bn.kernels.tensorflow import fused
from keras_bn.kernels.tensorflow import ghost_batches
from keras_bn.kernels.tensorflow import masked
from keras_bn.kernels.tensorflow import plain
from keras_bn.kernels.tensorflow.replicas import merge
from keras_bn.kernels.tensorflow.views import has_gpu
from keras_bn.kernels.tensorflow.views import has_tangents
from keras_bn.kernels.tensorflow.views import moments_type
from keras_bn.kernels.tensorflow.views import needs_plain_ops


def batch_moments(inputs, *, axis, mask=None, replicas=None):
    """Mean, biased variance and count of each channel. See the package."""
    return _moments(tf.stop_gradient(inputs), axis, mask, replicas)


def normalize_batch(
    inputs,
    gamma,
    beta,
    *,
    axis,
    epsilon,
    mask=None,
    moments=None,
    replicas=None,
):
    """Normalizes with the moments of the batch. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    if has_tangents(inputs, gamma, beta):
        moments = _moments(inputs, axis, mask, replicas)
        outputs = plain.normalize_with(
            inputs, *moments[:2], gamma, beta, axis=axis, epsilon=epsilon
        )
        return outputs, *moments
    own = mask is None and moments is None and replicas is None
    if own and not needs_plain_ops(inputs):
        return fused.normalize(inputs, gamma, beta, axis, epsilon)
    if moments is None:
        moments = batch_moments(
            inputs, axis=axis, mask=mask, replicas=replicas
        )
    outputs = _normalize_composed(
        inputs, gamma, beta, moments, mask, axis, epsilon, replicas
    )
    return outputs, *moments


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """Normalizes with given moments. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    road = plain if inputs.dtype == tf.float64 else fused
    return road.normalize_with(
        inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
    )


def normalize_ghost_batches(
    inputs, gamma, beta, *, axis, epsilon, size, mask=None
):
    """Normalizes parts of the batch. See the package."""
    gamma, beta = _defaults(inputs, gamma, beta, axis)
    settings = {"axis": axis, "epsilon": epsilon, "size": size}
    plain_batch = mask is None and not needs_plain_ops(inputs)
    if plain_batch and not has_gpu():
        return ghost_batches.normalize(inputs, gamma, beta, **settings)
    return ghost_batches.map_normalize(
        normalize_batch, inputs, gamma, beta, mask=mask, **settings
    )


def _moments(inputs, axis, mask, replicas):
    if mask is not None:
        moments = masked.moments(inputs, mask, axis)
    elif needs_plain_ops(inputs):
        moments = plain.moments(inputs, axis)
    else:
        moments = fused.moments(inputs, axis)
    return merge(replicas, *moments) if replicas else moments


def _normalize_composed(
    inputs, gamma, beta, moments, mask, axis, epsilon, replicas
):
    """Normalizes with moments of these inputs; the gradient is in plain ops.

    Only the inputs and the mask are kept for it.
    """
    mean, variance, count = moments

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        outputs = normalize_with(
            inputs, mean, variance, gamma, beta, axis=axis, epsilon=epsilon
        )

        def gradient(output_gradient):
            fits = not (has_gpu() or needs_plain_ops(inputs))
            if fits and mask is None and replicas is None:
                saved = mean, variance, tf.zeros([])
                return fused.gradients(
                    output_gradient, inputs, gamma, saved, axis, epsilon
                )
            if fits and (mask is None or replicas is None):
                return fused.wide_gradients(
                    output_gradient,
                    inputs,
                    gamma,
                    moments,
                    axis,
                    epsilon,
                    mask,
                    replicas,
                )
            return plain.gradients(
                output_gradient,
                inputs,
                gamma,
                mean,
                variance,
                count,
                axis=axis,
                epsilon=epsilon,
                mask=mask,
                replicas=replicas,
            )

        return outputs, gradient

    return normalize(inputs, gamma, beta)


def _defaults(inputs, gamma, beta, axis):
    shape, dtype = [inputs.shape[axis]], moments_type(inputs.dtype)
    gamma = tf.ones(shape, dtype) if gamma is None else gamma
    beta = tf.zeros(shape, dtype) if beta is None else beta
    return gamma, beta


def is_recomputation():
    """False: `tf.recompute_grad` does not let on that it repeats a call."""
    return False

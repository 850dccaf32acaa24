"""Batch normalization in pure JAX; `keras_bn.kernels` has the contract."""

import jax
import jax.numpy as jnp
from jax import lax

from keras_bn.kernels.jax.gradients import normalize_with_moments
from keras_bn.kernels.jax.moments import count_positions
from keras_bn.kernels.jax.moments import moments_of
from keras_bn.kernels.jax.moments import moments_of_parts
from keras_bn.kernels.jax.replicas import data_parallel_mesh
from keras_bn.kernels.jax.replicas import merge
from keras_bn.kernels.jax.replicas import on_shards
from keras_bn.kernels.jax.views import along
from keras_bn.kernels.jax.views import scale_factor


def batch_moments(inputs, *, axis, mask=None, replicas=None):
    """Mean, biased variance and count of each channel.

    Args:
        inputs: floating tensor of any rank from 2.
        axis: the channels' dimension, in `[0, rank)`.
        mask: None or boolean, of the rank of `inputs` and broadcastable to
            it; positions that are False do not count.
        replicas: None or from `find_replicas`: those whose positions count
            too.

    Returns:
        `(mean, variance, count)`, float32, or float64 for float64 inputs;
        `mean` and `variance` of shape `(channels,)`, `count` an int, or of
        shape `(channels,)` under a mask. No gradient flows through them.
    """

    def moments(replicas, inputs, mask):
        count = count_positions(inputs, mask, axis)
        mean, variance = moments_of(inputs, mask, axis)
        if replicas is None:
            return mean, variance, count
        return merge(replicas, mean, variance, count)

    inputs = lax.stop_gradient(inputs)
    mesh = None if replicas else data_parallel_mesh(inputs, axis)
    if mesh is None:
        return moments(replicas, inputs, mask)
    mean, variance, count = on_shards(
        mesh, moments, inputs, mask, returns_inputs=False
    )
    return mean, variance, _count(inputs, mask, axis, count)


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
    """Normalizes each channel with the moments of this batch.

    Args:
        inputs: floating tensor of any rank from 2.
        gamma, beta: None or of shape `(channels,)`.
        axis, mask, replicas: as in `batch_moments`.
        epsilon: added to the variance.
        moments: None, or what `batch_moments` returned for these inputs, this
            mask and these replicas.

    Returns:
        `(outputs, mean, variance, count)`: `outputs` like `inputs`, the rest
        as from `batch_moments`. Gradients flow from `outputs` to `gamma`,
        `beta` and, through the moments too, to `inputs`; from `mean` and
        `variance`, which JAX users get back as the new state, to `inputs`.
    """

    def normalize(replicas, inputs, mask, gamma, beta, moments):
        return _normalize_batch(
            inputs, gamma, beta, axis, epsilon, mask, moments, replicas
        )

    mesh = None if replicas else data_parallel_mesh(inputs, axis)
    if mesh is None:
        return normalize(replicas, inputs, mask, gamma, beta, moments)
    outputs, mean, variance, count = on_shards(
        mesh, normalize, inputs, mask, gamma, beta, moments
    )
    return outputs, mean, variance, _count(inputs, mask, axis, count)


def _count(inputs, mask, axis, count):
    """An int where the shape says it; `shard_map` returns arrays only."""
    return count_positions(inputs, None, axis) if mask is None else count


def _normalize_batch(
    inputs, gamma, beta, axis, epsilon, mask, moments, replicas
):
    if replicas:
        inputs = replicas.varying(inputs)
    if moments is None:
        moments = batch_moments(
            inputs, axis=axis, mask=mask, replicas=replicas
        )
    mean, variance = map(lax.stop_gradient, moments[:2])
    count = moments[2]
    # Inside `shard_map` devices share parameters, but not their gradients:
    # here they meet what the devices do not share, which JAX differentiates.
    if gamma is not None:
        gamma = jnp.where(True, gamma, mean)
    if beta is not None:
        beta = jnp.where(True, beta, mean)
    outputs, mean, variance = normalize_with_moments(
        inputs,
        gamma,
        beta,
        mean,
        variance,
        jnp.asarray(count, mean.dtype),
        mask,
        axis,
        epsilon,
        replicas,
    )
    return outputs, mean, variance, count


def normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon):
    """Normalizes each channel with moments that do not depend on `inputs`.

    Args:
        inputs: floating tensor of any rank from 2.
        mean, variance: of shape `(channels,)`.
        gamma, beta: None or of shape `(channels,)`.
        axis: the channels' dimension, in `[0, rank)`.
        epsilon: added to the variance.

    Returns:
        `gamma * (inputs - mean) / sqrt(variance + epsilon) + beta`, of the
        shape and dtype of `inputs`, computed in float32 or wider.
    """
    # A multiplication and an addition; one operation more can be seen in the
    # time of small channels.
    factor = scale_factor(variance, gamma, epsilon)
    offset = -mean * factor if beta is None else beta - mean * factor
    outputs = inputs.astype(mean.dtype) * along(axis, factor, inputs.ndim)
    outputs = outputs + along(axis, offset, inputs.ndim)
    return outputs.astype(inputs.dtype)


def normalize_ghost_batches(
    inputs, gamma, beta, *, axis, epsilon, size, mask=None
):
    """Normalizes parts of the batch, each with its own moments.

    Args:
        inputs, gamma, beta, axis, epsilon, mask: as in `normalize_batch`;
            `axis` is not 0.
        size: how many samples are a part; the last one may have less.

    Returns:
        `(outputs, mean, variance, count)`: `outputs` like `inputs`, the rest
        with a row for each part.
    """

    def normalize(inputs, mask, moments):
        moments = *moments, count_positions(inputs, mask, axis)
        outputs, mean, variance, count = _normalize_batch(
            inputs, gamma, beta, axis, epsilon, mask, moments, None
        )
        count = jnp.asarray(count, mean.dtype)
        return outputs, mean, variance, jnp.broadcast_to(count, mean.shape)

    def pick(tensor, start, number, length):
        """`number` parts of `length` samples, stacked."""
        picked = tensor[start : start + number * length]
        return picked.reshape(number, length, *tensor.shape[1:])

    # Under `vmap` a mask for all samples alike is not mapped over.
    of_samples = mask is not None and mask.shape[0] > 1
    batch = inputs.shape[0]
    whole, rest = divmod(batch, size)
    results = []
    for start, number, length in ((0, whole, size), (batch - rest, 1, rest)):
        if number * length:
            x = pick(inputs, start, number, length)
            kept = pick(mask, start, number, length) if of_samples else mask
            moments = moments_of_parts(lax.stop_gradient(x), kept, axis)
            outputs, *moments = jax.vmap(
                normalize, (0, 0 if of_samples else None, 0)
            )(x, kept, moments)
            outputs = outputs.reshape(-1, *inputs.shape[1:])
            results.append((outputs, *moments))
    if not results:
        moments = moments_of(inputs, mask, axis)
        outputs, *moments = normalize(inputs, mask, moments)
        return outputs, *(moment[None] for moment in moments)
    if len(results) == 1:
        return results[0]
    return tuple(map(jnp.concatenate, zip(*results)))


def is_recomputation():
    """False: what a repeated call does to the state is left out by JAX."""
    return False

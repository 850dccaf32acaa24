"""Replicas in JAX: the devices that share out a batch.

Inside `shard_map` and `pmap` a function sees the shard of one device, and what
it shares with the others it sends: one table with a row for each device, summed
over them. Everywhere else arrays are whole, and so are their moments. There a
`keras.distribution.DataParallel` says how the batch lies on the devices, and
`on_shards` hands each device its own, instead of leaving it to XLA to find out
what has to be sent: it would sum over all devices five times.
"""

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.sharding import PartitionSpec


class Replicas:
    """The devices along some axes of a mesh; two of the same axes are equal.

    Args:
        axes: tuple of names, those of manual axes.
    """

    def __init__(self, axes):
        self.axes = axes

    def __eq__(self, other):
        return type(self) is type(other) and self.axes == other.axes

    def __hash__(self):
        return hash(self.axes)

    @property
    def number(self):
        return lax.axis_size(self.axes)

    def total(self, x):
        """The sum over replicas, of a tensor of any shape."""
        return lax.psum(self.varying(x), self.axes)

    def gather(self, row):
        """The rows of all replicas, `(replicas, n)`, from each one's `(n,)`."""
        index = lax.axis_index(self.axes)
        table = jnp.zeros((self.number, row.size), row.dtype)
        return self.total(table.at[index].set(row))

    def _are_told_apart(self):
        """Whether `shard_map` checks what differs between replicas."""
        return bool(_varying_axes(lax.axis_index(self.axes)))

    def varying(self, x):
        if not self._are_told_apart():
            return x
        missing = tuple(a for a in self.axes if a not in _varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x


def find_replicas(axis_name, synchronized, state):
    """The replicas that the caller is one of, or None.

    Args:
        axis_name: str or tuple of them, the axes that replicas lie along;
            None: the only manual axis there is.
        synchronized: whether there has to be an answer.
        state: an array that the replicas are to agree about. Without an
            `axis_name` it may be known to differ along the axis, as where each
            device has channels of its own; then they are no replicas.

    Raises:
        ValueError: no axis has that name, or there are several and no name.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if axis_name is not None:
        axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        if not manual and not _are_bound(axes):
            return None
        for name in axes:
            if not _are_bound((name,)):
                raise ValueError(
                    "`axis_name` must name a manual axis of shard_map or pmap. "
                    f"Received: axis_name={axis_name!r}, where the manual "
                    f"axes are {tuple(manual)}."
                )
        return Replicas(axes) if axes else None
    if len(manual) > 1 and synchronized:
        raise ValueError(
            "With several manual axes BatchNormalization(synchronized=True) "
            f"needs `axis_name`. Received: axis_name=None, where the manual "
            f"axes are {tuple(manual)}. Name those that samples are split "
            "along."
        )
    if len(manual) != 1 or _varying_axes(state) & set(manual):
        return None
    return Replicas(tuple(manual))


def data_parallel_mesh(inputs, axis):
    """The mesh that `keras.distribution.DataParallel` splits a batch over.

    None where there is none, or `inputs` are no whole batch that it splits
    evenly, or where XLA does not compile the computation as a whole.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.DataParallel):
        return None
    if jax.sharding.get_abstract_mesh().manual_axes or axis == 0:
        return None
    if not isinstance(inputs, jax.core.Tracer):
        return None
    mesh = distribution.device_mesh.backend_mesh
    shards, samples = mesh.shape[mesh.axis_names[0]], inputs.shape[0]
    if shards == 1 or not isinstance(samples, int) or samples % shards:
        return None
    return mesh


def on_shards(mesh, function, inputs, mask, *rest, returns_inputs=True):
    """Calls `function` on each device with its shard of a whole batch.

    Args:
        mesh: from `data_parallel_mesh`.
        function: called with a `Replicas`, the shards of `inputs` and `mask`,
            and `rest`; returns `(outputs, mean, variance, count)`.
        inputs: the whole batch.
        mask: None or of the rank of `inputs`.
        *rest: what all devices share: arrays, None, tuples of them.
        returns_inputs: whether there are `outputs`.

    Returns:
        What `function` does, for the whole batch, as arrays.
    """
    name = mesh.axis_names[0]
    whole, split = PartitionSpec(), PartitionSpec(name)
    of_mask = split if mask is not None and mask.shape[0] > 1 else whole

    def on_shard(*shards):
        return tuple(map(jnp.asarray, function(Replicas((name,)), *shards)))

    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(split, of_mask, *[whole] * len(rest)),
        out_specs=(split, whole, whole, whole)[0 if returns_inputs else 1 :],
    )(inputs, mask, *rest)


def merge(replicas, mean, variance, count):
    """The moments of all replicas' positions, exactly (Chan et al., 1983).

    Where no mask tells positions apart every replica has as many.
    """
    channels = mean.shape[0]
    if isinstance(count, int):
        table = replicas.gather(jnp.concatenate([mean, variance]))
        means, variances = jnp.split(table, [channels], axis=1)
        count = count * replicas.number
        share = 1 / replicas.number
    else:
        count = jnp.broadcast_to(count, mean.shape)
        table = replicas.gather(jnp.concatenate([mean, variance, count]))
        means, variances, counts = jnp.split(table, 3, axis=1)
        count = jnp.sum(counts, 0)
        share = counts / jnp.maximum(count, 1)
    mean = jnp.sum(share * means, 0)
    mean += jnp.sum(share * (means - mean), 0)
    variance = jnp.sum(share * (variances + jnp.square(means - mean)), 0)
    return mean, variance, count


def _are_bound(axes):
    try:
        lax.axis_size(axes)
    except NameError:
        return False
    return True


def _varying_axes(x):
    return jax.typeof(x).manual_axis_type.varying

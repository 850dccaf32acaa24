"""Replicas in PyTorch: the processes of a `torch.distributed` group."""

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from keras_bn.kernels.torch.checkpointing import is_recomputation
from keras_bn.kernels.torch.plain import filled


class Replicas:
    """The processes of one group.

    Args:
        group: a `torch.distributed.ProcessGroup`.
    """

    def __init__(self, group):
        self._group = group

    def total(self, x):
        """The sum over replicas, of a tensor of any shape; differentiable."""
        return _Total.apply(x, self)

    def gather(self, row):
        """The rows of all replicas, `(replicas, n)`, from each one's `(n,)`."""
        # The sum of tables with one row filled in is the whole table.
        number = distributed.get_world_size(self._group)
        table = row.new_zeros(number, len(row))
        table[distributed.get_rank(self._group)] = row
        self._all_reduce(table)
        return table

    def _all_reduce(self, x):
        try:
            distributed.all_reduce(x, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                "BatchNormalization waited in vain for another replica, which "
                "stopped or runs other layers. Received from "
                f"torch.distributed: {str(error).splitlines()[0]}"
            ) from error


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, replicas):
        ctx.replicas = replicas
        x = x.clone(memory_format=torch.contiguous_format)
        replicas._all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.replicas.total(gradient), None


def find_replicas(axis_name, synchronized, state):
    """The replicas that the caller is one of, or None.

    A running group does not say that all of its processes train. Inside of
    `DistributedDataParallel` they do; elsewhere only who asks for
    `synchronized` moments says so, as with PyTorch's SyncBatchNorm. Replicas
    that DDP is told not to give the same buffers go on with their own.

    Raises:
        ValueError: `synchronized` inside of DDP's `join`, whose early ones
            answer no collective but its own.
    """
    del axis_name
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is None and not synchronized:
        return None
    group = _group_of(parallel, state)
    if distributed.get_world_size(group) == 1:
        return None
    joined = parallel is not None and parallel._join_config.enable
    if not synchronized and (joined or not parallel.forward_sync_buffers):
        return None
    if joined:
        raise ValueError(
            "A synchronized BatchNormalization does not work under "
            "DistributedDataParallel.join. Received: synchronized=True. Give "
            "every process as many batches; they may be empty."
        )
    replicas = Replicas(group)
    _check_channels(replicas, state)
    return replicas


# From statistics to the group that trained them last.
_groups = WeakIdKeyDictionary()


def _group_of(parallel, state):
    if parallel is not None:
        if not torch.compiler.is_compiling():
            _groups[state] = parallel.process_group
        return parallel.process_group
    if is_recomputation() and state in _groups:
        # Gradient checkpointing calls the layer again outside of DDP.
        return _groups[state]
    return distributed.group.WORLD


# The statistics whose size the replicas have compared.
_compared = WeakIdKeyDictionary()


def _check_channels(replicas, state):
    """Raises ValueError where replicas do not have the same channels.

    Collectives of tensors that differ in size end the process. The sizes are
    compared once for each layer.
    """
    if torch.compiler.is_compiling() or state in _compared:
        return
    size = torch.tensor([state.numel()], device=state.device)
    sizes = replicas.gather(size).flatten().tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            "A synchronized BatchNormalization needs the same channels on all "
            f"replicas. Received: {sizes} channels on replicas 0 to "
            f"{len(sizes) - 1}. Build the same model on each."
        )
    _compared[state] = True


def merge(replicas, mean, variance, count):
    """The moments of all replicas' positions, exactly (Chan et al., 1983)."""
    # Without a mask one number counts for all channels.
    count = filled(count, like=mean).reshape(-1)
    table = replicas.gather(torch.cat([mean, variance, count]))
    channels = len(mean)
    means, variances, counts = table.split([channels, channels, len(count)], 1)
    count = counts.sum(0)
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    mean = mean + (share * (means - mean)).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return mean, variance, count

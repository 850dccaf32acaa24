"""Gradient checkpointing: forward passes that PyTorch runs a second time."""

import torch


def is_recomputation():
    """Whether the backward pass of `torch.utils.checkpoint` asks for this.

    PyTorch says no more than that a backward pass is running, as it does in
    `torch.utils.module_tracker`; a layer is not called there for other reasons.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1

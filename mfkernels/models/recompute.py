"""Activation checkpointing of a network's blocks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_block(network: nn.Module, block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`; in training, where the network's `grad_checkpointing` is on, without keeping what is
    between: the backward pass computes it again."""
    if not (network.grad_checkpointing and network.training and torch.is_grad_enabled()):
        return block(*inputs)
    contexts = lambda: (nullcontext(), _statistics_kept(block))  # noqa: E731
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms have counted this batch when it was computed first: not a second time."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter

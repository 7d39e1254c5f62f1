"""The base of the networks of all families."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Stage(NamedTuple):
    """A map of a network: the module that it comes from, its channels, image pixels for one of its own."""

    name: str
    channels: int
    reduction: int


class Network(nn.Module):
    """A network for classification, whose maps make a pyramid."""

    in_channels: int
    feature_stages: tuple[Stage, ...]
    head_modules: tuple[str, ...]  # what comes after the last map; some may not be there
    grad_checkpointing = False

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the last map of each size, those of `feature_stages`."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only what blocks begin with, and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`, checkpointed or not."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
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

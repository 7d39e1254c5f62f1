"""What narrow weights are in plain PyTorch."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.features import FeaturePyramid
from ..models.iformer import IFormer
from ..nn import KernelAttention
from .mobilenet import mobilenet_chain
from .packing import narrowed


@torch.no_grad()
def rounded(model: nn.Module, weights: torch.dtype) -> nn.Module:
    """Return the network that `deploy(model, weights=weights)` computes, a copy in float64.

    Its layers over rows (tokens, means, features) have weights rounded to this dtype, int8 with a factor of
    each output. An iFormer is fused before.
    """
    copied = copy.deepcopy(model).double()
    network = copied.network if isinstance(copied, FeaturePyramid) else copied
    if isinstance(network, IFormer):
        network.fuse()
    for layer in _over_rows(network):
        values, factors = narrowed(layer.weight.flatten(1), weights)
        layer.weight.copy_((values.double() * factors[:, None]).view_as(layer.weight))
    return copied


def _over_rows(network: Any) -> Iterator[Any]:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            yield module
        elif isinstance(module, KernelAttention):
            yield from (module.net1, module.net2)
    chain = mobilenet_chain(network)
    if chain is None:
        return
    yield from (conv.layer for _, conv in chain.linears if isinstance(conv.layer, nn.Conv2d))
    for part in chain.parts:
        for layer in part.layers:
            if hasattr(layer, "expand"):  # squeeze-and-excitation
                yield from (layer.reduce, layer.expand)

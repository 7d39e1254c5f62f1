"""Define narrow weights and products in int8 in plain PyTorch."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...models.features import FeaturePyramid
from ...models.iformer import IFormer
from ...nn import KernelAttention
from .mobilenet import mobilenet_chain
from .packing import Rounding, narrowed


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


def rounded_inputs(x: Tensor, rounding: Rounding) -> Tensor:
    """Return the integers that a product in int8 takes x for, without `zero`: x * scale, rounded and cut off.

    Halves go to where the byte is even.

    Args:
        x: float32 of any shape.
        rounding: of the product.

    Returns:
        int64 of x's shape, from -zero to 255 - zero.
    """
    cut = (x * rounding.scale).clamp(-rounding.zero, 255 - rounding.zero)
    first = 2.0**23 + rounding.zero  # from here on floats are integers
    return ((cut + first) - 2.0**23).long() - rounding.zero


def product_of_bytes(
    x: Tensor, weight: Tensor, rounding: Rounding, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Return the convolution that a product in int8 computes, without a bias.

    Weights are int8 with a factor of each output; the sums of products are integers.

    Args:
        x: (B, C, H, W), float32.
        weight: (O, C / groups, k, k).
        rounding: of x.
        stride, padding, groups: as of a convolution.

    Returns:
        (B, O, H', W'), float32.
    """
    values, factors = narrowed(weight.flatten(1).double(), torch.int8)
    integers = rounded_inputs(x, rounding).double()  # exact: their sums stay below 2^53
    matrix = values.view(weight.shape).double()
    sums = nn.functional.conv2d(integers, matrix, stride=stride, padding=padding, groups=groups)
    return sums.float() * (factors / rounding.scale).float().view(-1, 1, 1)

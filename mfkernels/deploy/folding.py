"""Batch norms as a part of the layers before them."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..models.dynamic_mobile_former import DynamicMobileFormer
from ..nn import (
    DMFStem,
    DynamicMobile,
    DynamicResidualConv2d,
    InvertedBottleneck,
    InvertedResidualFFN,
    KernelAttention,
)
from ..nn.conv_bn import affine
from ..nn.inputs import untouched

# Layers and the norms after them, by their names.
_PAIRS: dict[type, tuple[tuple[str, str], ...]] = {
    DMFStem: (("conv", "bn"),),
    DynamicMobile: (("pw_conv1", "bn1"), ("dw_conv", "bn2"), ("pw_conv2", "bn3")),
    DynamicMobileFormer: (("channel_conv", "bn"),),
    InvertedBottleneck: (("pw_conv1", "bn1"), ("dw_conv", "bn2"), ("pw_conv2", "bn3")),
    InvertedResidualFFN: (("pw_conv1", "bn1"), ("pw_conv2", "bn3")),
    KernelAttention: (("net1", "bn"),),
}


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """In place, those that follow a layer in an `nn.Sequential` or in a module of DMF.

    The temperature of DMF's kernel attentions becomes a part of their last layers, too.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            names = [name for name, _ in module.named_children()]
            _fold(module, pairwise(names))
        elif type(module) in _PAIRS:
            _fold(module, (pair for pair in _PAIRS[type(module)] if hasattr(module, pair[1])))
        if isinstance(module, KernelAttention):
            with torch.no_grad():
                module.net2.weight /= module.temperature
            module.temperature = 1.0
    return model


def _fold(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    for first, second in pairs:
        layer, norm = getattr(module, first), getattr(module, second)
        if type(layer) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            setattr(module, first, fuse_conv_bn_eval(layer, norm))
        elif type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d:
            setattr(module, first, fuse_linear_bn_eval(layer, norm))
        elif type(layer) is DynamicResidualConv2d and type(norm) is nn.BatchNorm2d:
            _scale(layer, norm)
        else:
            continue
        setattr(module, second, nn.Identity())


def _scale(conv: DynamicResidualConv2d, norm: nn.BatchNorm2d) -> None:
    """Make the norm a part of all kernels of the convolution, and of a bias, in place."""
    scale, shift = affine(norm)
    factors = scale.view(-1, 1, 1, 1)
    with torch.no_grad():
        conv.static_weight.copy_(conv.static_weight * factors)
        conv.weight.copy_(conv.weight * factors)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


def folded(layers: Iterable[nn.Module]) -> nn.Conv2d | None:
    """Return an `nn.Sequential`'s convolution with its batch norm folded; None where it has other parts."""
    conv, *rest = layers
    if not isinstance(conv, nn.Conv2d) or any(type(layer) is not nn.Identity for layer in rest):
        return None
    return conv if untouched(conv, nn.Conv2d) and conv.bias is not None else None

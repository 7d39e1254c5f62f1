"""PyTorch's own `nn.Sequential`, where batch norms are in it."""

from itertools import pairwise
from typing import Any

from torch import nn

from ..nn import FusedSequential
from .settings import Found, random_inputs


def fused_sequential(old: Any) -> Found:
    """Its layers stay what they are: they are visited after it."""
    if type(old) is not nn.Sequential:
        return None
    kinds = [type(layer) for layer in old]
    iformer = ("Conv2d_BN", "ConvNorm")  # the released one and timm's
    released = any(a.__name__ in iformer and b is nn.GELU for a, b in pairwise(kinds))
    first = next((m for m in old.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or not (released or nn.BatchNorm2d in kinds):
        return None
    new = FusedSequential()
    new._modules.update(old._modules)
    new.training = old.training
    return new, lambda: random_inputs((2, first.in_channels, 12, 13))


RULES = (fused_sequential,)

"""iFormer in fewer kernels on a GPU."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...models.iformer import IFormer
from ...nn import FusedSequential, Residual, SingleHeadModulationAttention
from ...nn.convolution import is_pointwise
from ...nn.drop_path import DropPath
from ...nn.inputs import untouched
from .pointwise import pointwise


class PointwiseResidual(nn.Module):
    """Run a residual part that ends in two pointwise convolutions with a GELU between, each in one kernel.

    Args:
        residual: one that `is_pair`.
    """

    def __init__(self, residual: Any) -> None:
        super().__init__()
        *before, self.first, _, self.last = residual.m
        self.before = nn.Sequential(*before)

    def forward(self, x: Tensor) -> Tensor:
        y = pointwise(self.before(x), self.first.weight, self.first.bias, None, True)
        return pointwise(y, self.last.weight, self.last.bias, x, False)


class AttentionResidual(nn.Module):
    """Run an attention with its residual in three kernels; one makes all that it takes from the map.

    Args:
        residual: one that `is_attention`.
    """

    def __init__(self, residual: Any) -> None:
        super().__init__()
        self.mixer = residual.m
        convs = [self.mixer.v_gate, self.mixer.q, self.mixer.k]
        self.sizes = [conv.out_channels // n for conv, n in zip(convs, (2, 1, 1), strict=True)]
        self.sizes.insert(0, self.sizes[0])
        self.weight, self.bias = (
            nn.Parameter(torch.cat([getattr(conv, name).detach() for conv in convs]), requires_grad=False)
            for name in ("weight", "bias")
        )

    def forward(self, x: Tensor) -> Tensor:
        mixer = self.mixer
        v, gate, q, k = pointwise(x, self.weight, self.bias, None, False).split(self.sizes, 1)
        y = ops.modulation_attention(q, k, v, gate, mixer.scale, mixer.form, None)
        return pointwise(y, mixer.proj.weight, mixer.proj.bias, x, False)


def is_pair(residual: Any) -> bool:
    """Whether a part of a network, with folded batch norms, ends as `PointwiseResidual` says."""
    if not _is_residual(residual) or not untouched(residual.m, FusedSequential) or len(residual.m) < 3:
        return False
    first, gelu, last = residual.m[-3:]
    return _is_biased(first, last) and untouched(gelu, nn.GELU) and gelu.approximate == "none"


def is_attention(residual: Any) -> bool:
    """Whether a part of a network, with folded batch norms, is an attention without windows."""
    if not _is_residual(residual) or not untouched(residual.m, SingleHeadModulationAttention):
        return False
    mixer = residual.m
    return mixer.window_size is None and _is_biased(mixer.v_gate, mixer.q, mixer.k, mixer.proj)


def _is_residual(residual: Any) -> bool:
    plain = untouched(residual, Residual) and untouched(residual.drop_path, DropPath)
    return plain and residual.gamma is None


def _is_biased(*convs: Any) -> bool:
    return all(untouched(conv, nn.Conv2d) and is_pointwise(conv) and conv.bias is not None for conv in convs)


def with_pointwise_kernels(model: IFormer) -> nn.Module | None:
    """Return the network with fused residual parts, on the same parameters but for few; None if it has none.

    Args:
        model: its batch norms are folded.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    fused, found = copy.deepcopy(model, shared), False
    for parent in list(fused.modules()):
        for name, part in list(parent.named_children()):
            for fits, kind in ((is_pair, PointwiseResidual), (is_attention, AttentionResidual)):
                if isinstance(part, Residual) and fits(part):
                    setattr(parent, name, kind(part))
                    found = True
    return fused if found else None

"""Dynamic Mobile-Former in fewer kernels on a GPU."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...models.dynamic_mobile_former import DynamicMobileFormer
from ...nn import (
    DMFBlock,
    DMFFormer,
    DMFMobileToFormer,
    DropPath,
    DynamicMobile,
    DynamicResidualConv2d,
    FusedSequential,
    GlobalResponseNorm,
    InvertedResidualFFN,
    KernelAttention,
)
from ...nn.dmf_tokens import _MLP, _TokenAttention
from ...nn.inputs import untouched
from ...streams import side_by_side
from .activated_conv import dynamic_conv, response_factors, response_gelu, static_conv
from .kernel_scores import kernel_scores
from .pointwise import pointwise

_KNOWN = (
    *(DMFBlock, DMFFormer, DMFMobileToFormer, DropPath, DynamicMobile, DynamicResidualConv2d),
    *(FusedSequential, GlobalResponseNorm, InvertedResidualFFN, KernelAttention, _MLP, _TokenAttention),
    *(nn.Conv2d, nn.Dropout, nn.GELU, nn.GroupNorm, nn.Identity, nn.LayerNorm, nn.Linear, nn.ReLU),
)

BASIS_SCALE = 0.1  # of `DynamicResidualConv2d`
Sums = tuple[Tensor, int]  # (B, S, C), in S parts, and of how many pixels they are


class FusedDynamicConv(nn.Module):
    """Run a dynamic convolution in two kernels, the first of which makes the weights of its kernels.

    Args:
        conv: one that `is_known`, with a batch norm folded into its attention.
    """

    def __init__(self, conv: DynamicResidualConv2d) -> None:
        super().__init__()
        self.conv = conv

    def run(
        self, x: Tensor, token: Tensor, sums: Sums | None, gelu: bool, summed: bool
    ) -> tuple[Tensor, Sums | None]:
        """Return the map, or its GELU, and where `summed` the sums of its pixels; `sums` are those of x."""
        conv: Any = self.conv
        attention = conv.Kernel_Attention
        first, last = attention.net1, attention.net2
        weights = first.weight.flatten(1), first.bias, last.weight.flatten(1)
        softmax = attention.activation == "softmax"
        scores = kernel_scores(*(sums or means(x)), token, *weights, softmax)
        settings = conv.stride, conv.padding, conv.groups, BASIS_SCALE
        kernels = conv.static_weight, conv.weight, scores, conv.bias
        y, parts = dynamic_conv(x, *kernels, *settings, gelu, int(summed))
        return y, (parts, y.shape[2] * y.shape[3]) if summed else None

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        return self.run(x, token, None, gelu=False, summed=False)[0]


def means(x: Tensor) -> Sums:
    """Return the means as sums of one pixel."""
    return x.mean((2, 3))[:, None], 1


class FusedBridge(nn.Module):
    """Run the bridge to the tokens with its residual in its last product.

    Args:
        bridge: one that `is_known`.
    """

    def __init__(self, bridge: DMFMobileToFormer) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        bridge = self.bridge
        tokens = bridge.norm(tokens)
        gathered: Any = ops.mobile_to_former_attention(x, bridge.q(tokens), bridge.num_heads)
        rows = torch.addmm(tokens.flatten(0, 1), gathered.flatten(0, 1), bridge.fc.weight.t())
        return rows.view_as(tokens)


class FusedDMFBlock(nn.Module):
    """Run a block of DMF in fewer kernels: activations are in those of convolutions and norms.

    Args:
        block: one that `is_known`, with folded batch norms.
        pointwise: the static convolutions are Triton kernels, too, with what comes before and after them.
    """

    def __init__(self, block: DMFBlock, pointwise: bool) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.block, self.bridge = block, FusedBridge(block.mobile2former)
        mobile: Any = block.dynamic_mobile
        self.convs = nn.ModuleList(
            FusedDynamicConv(conv) if isinstance(conv, DynamicResidualConv2d) else conv
            for conv in (mobile.pw_conv1, mobile.dw_conv, mobile.pw_conv2)
        )
        self.shortcut = copy.deepcopy(block.ffn.dw_conv)  # whose input is added to its result
        middle = self.shortcut.kernel_size[0] // 2
        with torch.no_grad():
            self.shortcut.weight[:, :, middle, middle] += 1

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        block, ffn, grn = self.block, self.block.ffn, self.block.ffn.grn
        new, begun = side_by_side(
            lambda: block.former(self.bridge(x, tokens)), lambda: self._begin(x), x, tokens
        )
        out = self._mobile(*begun, new[:, 0])
        y, (first, last) = block.norm(out), (ffn.pw_conv1, ffn.pw_conv2)
        norm, form = (grn.gamma.flatten(), grn.beta.flatten()), (grn.mean, grn.eps)
        if not self.pointwise:
            y = self.shortcut(F.gelu(first(y)))
            return last(response_gelu(y, *norm, *form)) + out, new
        y = pointwise(y, first.weight, first.bias, None, True)
        y, squares = static_conv(y, self.shortcut, False, 2)
        factors = response_factors(squares, norm[0], *form)
        return pointwise(y, last.weight, last.bias, out, False, factors, norm[1]), new

    def _begin(self, x: Tensor) -> tuple[Tensor, Sums | None]:
        """Compute what does not depend on the token: the halved map, and its means."""
        mobile: Any = self.block.dynamic_mobile
        dynamic = mobile.dynamic[0]
        if hasattr(mobile, "downsample"):
            if self.pointwise:
                x, parts = static_conv(x, mobile.downsample[0], True, int(dynamic))
                return x, (parts, x.shape[2] * x.shape[3]) if dynamic else None
            x = mobile.downsample(x)
        return x, means(x) if dynamic else None

    def _mobile(self, x: Tensor, sums: Sums | None, token: Tensor) -> Tensor:
        dynamic = *self.block.dynamic_mobile.dynamic, False
        for i, conv in enumerate(self.convs):
            gelu, summed = i < 2, dynamic[i + 1]
            if isinstance(conv, FusedDynamicConv):
                x, sums = conv.run(x, token, sums, gelu, summed)
            else:
                x, sums = conv(x), None
                x = F.gelu(x) if gelu else x
        return x


def is_known(block: nn.Module) -> bool:
    """Whether a part of a network is as in the released ones, with folded batch norms."""
    exact = all(part.approximate == "none" for part in block.modules() if isinstance(part, nn.GELU))
    return exact and all(untouched(part, *_KNOWN) for part in block.modules())


def with_fused_dmf_blocks(model: DynamicMobileFormer, pointwise: bool) -> nn.Module | None:
    """Return the network with fused blocks, on the same parameters but for few; None where none can be one.

    Args:
        model: its batch norms are folded.
        pointwise: see `FusedDMFBlock`.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    fused = copy.deepcopy(model, shared)
    found = False
    for i, block in enumerate(fused.blocks):
        if is_known(block):
            fused.blocks[i], found = FusedDMFBlock(block, pointwise), True  # type: ignore[arg-type]
    kinds: Any = dict(channel_conv=FusedDynamicConv, end_mobile2former=FusedBridge)
    for name, kind in kinds.items():
        part = getattr(fused, name)
        if is_known(part):
            setattr(fused, name, kind(part))
    return fused if found else None

"""A depthwise convolution and the dynamic ReLUs around it: one kernel on a GPU."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.mobile_former_block import MobileFormerBlock
from ...operators.dynamic_relu import dynamic_relu_reference
from ..folding import folded
from .by_kernel import by_kernel


def activated_depthwise_reference(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, behind: Tensor
) -> Tensor:
    """Define the Triton kernel in plain PyTorch.

    It is dynamic ReLU, 3x3 depthwise convolution of stride 1 with zeros around the map, and dynamic ReLU.
    Output e of E comes from channel floor(e * C / E).

    Args:
        x: (B, C, H, W).
        before: (B, 2, C), the slopes of the first dynamic ReLU, see `mfkernels.ops.dynamic_relu`; None: there
            is none.
        weight: (E, 1, 3, 3), E a multiple of C.
        bias: (E,).
        behind: (B, 2, E), the slopes of the second.

    Returns:
        (B, E, H, W).

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2.
    """
    x = x if before is None else dynamic_relu_reference(x, before)
    return dynamic_relu_reference(F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]), behind)


def activated_depthwise(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("activated_depthwise_triton", activated_depthwise_reference, *arguments)


def activated_depthwise_of(block: Any) -> nn.Conv2d | None:
    """Return the convolution for which the kernel can stand, of a released block with folded batch norms."""
    normal = isinstance(block, MobileFormerBlock)
    if (normal and block.before_skip) or (block.act3 if normal else block.act4).num_functions != -1:
        return None
    conv = folded(block.conv2 if normal else block.conv3)
    if conv is None or conv.groups != conv.in_channels:
        return None
    shape = conv.kernel_size, conv.stride, conv.padding
    return conv if shape == ((3, 3), (1, 1), (1, 1)) else None

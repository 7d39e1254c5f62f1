"""A pointwise convolution with the GELU or the residual after it: one kernel on a GPU."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .by_kernel import by_kernel


def pointwise_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, gelu: bool
) -> Tensor:
    """Define the Triton kernel in plain PyTorch.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 1, 1).
        bias: (O,).
        residual: (B, O, H, W), which is added to the result; or None.
        gelu: of the result, before.

    Returns:
        (B, O, H, W).
    """
    y = F.conv2d(x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


def pointwise(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("pointwise_triton", pointwise_reference, *arguments)

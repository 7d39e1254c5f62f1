"""A pointwise convolution with the GELU or the residual after it: one kernel on a GPU."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .by_kernel import by_kernel


def pointwise_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    gelu: bool,
    factors: Tensor | None = None,
    shifts: Tensor | None = None,
) -> Tensor:
    """Define the Triton kernel in plain PyTorch.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 1, 1).
        bias: (O,).
        residual: (B, O, H, W), which is added to the result; or None.
        gelu: of the result, before.
        factors: (B, C), float32 or wider; or None. GELU of the map times these plus shifts is convolved.
        shifts: (C,), where there are factors.

    Returns:
        (B, O, H, W).
    """
    if factors is not None and shifts is not None:
        x = F.gelu(x * factors[..., None, None] + shifts[:, None, None]).to(x.dtype)
    y = F.conv2d(x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


def pointwise(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("pointwise_triton", pointwise_reference, *arguments)

"""Dynamic convolutions and the norms of responses, each with the GELU after it in its kernel on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...operators.dynamic_conv2d import dynamic_conv2d_reference
from ...operators.global_response_norm import global_response_norm_reference
from .by_kernel import by_kernel


def dynamic_conv_reference(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    groups: int,
    basis_scale: float,
    gelu: bool,
    summed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Define the Triton kernel in plain PyTorch.

    Args:
        x, weight, basis, attention, bias, stride, padding, groups, basis_scale: of
            `mfkernels.ops.dynamic_conv2d`.
        gelu: there is one after it.
        summed: the sums are wanted.

    Returns:
        (B, O, H', W'), and its sums over the pixels (B, S, O) in S parts, of float32 or wider; S is the
        kernel's choice, and 1 here.
    """
    settings = (stride, padding, 1, groups, basis_scale)
    y = dynamic_conv2d_reference(x, weight, basis, attention, bias, None, *settings)
    y = F.gelu(y) if gelu else y
    wide = torch.promote_types(y.dtype, torch.float32)
    return y, y.sum((2, 3), dtype=wide)[:, None] if summed else None


def dynamic_conv(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("activated_conv_triton", dynamic_conv_reference, *arguments)


def response_gelu_reference(x: Tensor, gamma: Tensor, beta: Tensor, mean: str, eps: float) -> Tensor:
    """Define the Triton kernel in plain PyTorch: GELU of `mfkernels.ops.global_response_norm`."""
    return F.gelu(global_response_norm_reference(x, gamma, beta, mean, eps))


def response_gelu(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("activated_conv_triton", response_gelu_reference, *arguments)

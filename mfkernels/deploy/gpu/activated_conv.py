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
    power_of_sums: int,
) -> tuple[Tensor, Tensor]:
    """Define the Triton kernel in plain PyTorch.

    Args:
        x, weight, basis, attention, bias, stride, padding, groups, basis_scale: of
            `mfkernels.ops.dynamic_conv2d`.
        gelu: there is one after it.
        power_of_sums: 1 where the sums are wanted, 2 where those of squares, else 0.

    Returns:
        (B, O, H', W'), and its sums over the pixels (B, S, O) in S parts, of float32 or wider; S is the
        kernel's choice, and 1 here; without sums 0.
    """
    settings = (stride, padding, 1, groups, basis_scale)
    y = dynamic_conv2d_reference(x, weight, basis, attention, bias, None, *settings)
    y = F.gelu(y) if gelu else y
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return y, (wide**power_of_sums).sum((2, 3))[:, None][:, : min(1, power_of_sums)]


def dynamic_conv(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("activated_conv_triton", dynamic_conv_reference, *arguments)


def response_gelu_reference(x: Tensor, gamma: Tensor, beta: Tensor, mean: str, eps: float) -> Tensor:
    """Define the Triton kernel in plain PyTorch: GELU of `mfkernels.ops.global_response_norm`."""
    return F.gelu(global_response_norm_reference(x, gamma, beta, mean, eps))


def response_gelu(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("activated_conv_triton", response_gelu_reference, *arguments)


def static_conv(x: Tensor, conv: Any, gelu: bool, power_of_sums: int) -> tuple[Tensor, Tensor]:
    """Run `dynamic_conv` with a convolution that has one kernel, an odd square."""
    (stride, _), (padding, _) = conv.stride, conv.padding
    none = conv.weight.new_empty(0, *conv.weight.shape), x.new_empty(x.shape[0], 0)
    settings = stride, padding, conv.groups, 1.0, gelu, power_of_sums
    return dynamic_conv(x, conv.weight, *none, conv.bias, *settings)


def response_factors_reference(squares: Tensor, gamma: Tensor, mean: str, eps: float) -> Tensor:
    """Define the Triton kernel in plain PyTorch: factors of `mfkernels.ops.global_response_norm`.

    Args:
        squares: (B, S, C), sums of a map's squares in S parts.
        gamma, mean, eps: of that operator.

    Returns:
        (B, C), in the dtype of `squares`: the norm multiplies the map by it, and adds beta.
    """
    norms = squares.sum(1).sqrt()
    below = norms.mean(1, keepdim=True) if mean == "channels" else norms
    return 1 + gamma.to(norms.dtype) * norms / (below + eps)


def response_factors(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("activated_conv_triton", response_factors_reference, *arguments)

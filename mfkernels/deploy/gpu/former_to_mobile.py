"""The bridge from the tokens, with the residual before it: one kernel on a GPU."""

from typing import Any

from torch import Tensor

from ...operators.former_to_mobile_attention import former_to_mobile_attention_reference
from .by_kernel import by_kernel


def former_to_mobile_reference(
    x: Tensor, residual: Tensor | None, keys: Tensor, values: Tensor, num_heads: int
) -> Tensor:
    """Define the Triton kernel in plain PyTorch.

    Args:
        x, keys, values, num_heads: of `mfkernels.ops.former_to_mobile_attention`.
        residual: (B, C, H, W), which is added to x before; or None.

    Returns:
        (B, C, H, W).
    """
    x = x if residual is None else x + residual
    return former_to_mobile_attention_reference(x, keys, values, num_heads)


def former_to_mobile(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("former_to_mobile_triton", former_to_mobile_reference, *arguments)

"""The weights of a dynamic convolution's kernels: one kernel on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .by_kernel import by_kernel


def kernel_scores_reference(
    sums: Tensor,
    pixels: int,
    token: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    softmax: bool,
) -> Tensor:
    """Define the Triton kernel in plain PyTorch.

    It is two linear layers with a ReLU between, of the token and the means of a map, and a sigmoid or a
    softmax.

    Args:
        sums: (B, S, C), of the map's pixels, in S parts; float32, or the dtype of `token`.
        pixels: how many the map has.
        token: (B, d).
        weight1: (h, d + C).
        bias1: (h,).
        weight2: (K, h).
        softmax: over the kernels; else a sigmoid.

    Returns:
        (B, K), in the dtype of `token`.

    Source: Yun and Ro, Dynamic Mobile-Former, equation 4 and figure 3.
    """
    mean = (sums.sum(1) / pixels).to(token.dtype)
    hidden = F.relu(F.linear(torch.cat([token, mean], 1), weight1, bias1))
    scores = F.linear(hidden, weight2)
    return torch.softmax(scores, 1) if softmax else torch.sigmoid(scores)


def kernel_scores(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("kernel_scores_triton", kernel_scores_reference, *arguments)

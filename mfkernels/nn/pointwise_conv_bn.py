from typing import TypeGuard

import torch
from torch import Tensor, nn

from .. import ops
from ..operators.runner import is_eager
from .batch_norm import is_plain_norm, normalize
from .convolution import convolve, is_pointwise, takes_plain


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    """Apply a convolution, the batch norm and the activation after it: `gelu(norm(conv(x)))`.

    In inference on a CPU a 1x1 convolution does all this in one kernel. Otherwise they are `normalize` and,
    in training, our kernels where they are faster. Layers of other kinds, and such with hooks, are called.

    Args:
        conv: an `nn.Conv2d`, or whatever stands in its place.
        norm: an `nn.BatchNorm2d`, or whatever stands in its place.
        x: (B, C, H, W).
        activation: "none" or "gelu".

    Returns:
        (B, O, H', W').

    Raises:
        ValueError: `activation` is neither, or in train mode a channel has one number.
    """
    if not _is_one_pass(conv, norm, x):
        return normalize(norm, convolve(conv, x), activation)
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    statistics = norm.running_mean, norm.running_var
    return ops.pointwise_conv_bn(x, conv.weight, norm.weight, norm.bias, *statistics, norm.eps, activation)


def _is_one_pass(conv: nn.Module, norm: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    return (
        not torch.is_grad_enabled()
        and is_eager()
        and not norm.training
        and is_pointwise(conv)
        and conv.bias is None
        and takes_plain(conv, x)
        and is_plain_norm(norm, x)
        and norm.weight.dtype == x.dtype
    )

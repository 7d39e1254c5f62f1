from typing import TypeGuard

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..operators.runner import is_eager
from .inputs import untouched

SMALL = 12_000_000  # multiplications of a 1x1 convolution


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(x)`.

    In training on a CPU two kinds of convolutions run by our kernels: 1x1 ones, unless they are so small that
    calls take longer than work, and depthwise ones with a large kernel, the gradient of whose weights takes
    PyTorch ten times as long. Compilers and exporters get PyTorch's, which they know better.
    """
    if not torch.is_grad_enabled() or not is_eager() or not _trains_faster(conv, x):
        return conv(x)
    if not takes_plain(conv, x) or not conv.weight.requires_grad:
        return conv(x)
    none = conv.weight.new_empty(0, *conv.weight.shape), x.new_empty(x.shape[0], 0)
    return ops.dynamic_conv2d(
        x, conv.weight, *none, conv.bias, padding=conv.kernel_size[0] // 2, groups=conv.groups
    )


def _trains_faster(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    if is_pointwise(conv):
        return x.numel() * conv.out_channels >= SMALL
    return _is_large_depthwise(conv)


def is_pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding == (0, 0)
    )


def _is_large_depthwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size in ((5, 5), (7, 7))
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.padding_mode == "zeros"
    )


def takes_plain(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether our kernels may do a call. In half precision PyTorch's own are faster."""
    return (
        backends.current_backend() in ("auto", "cpu")
        and not x.is_cuda
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous()
        and x.dtype == conv.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and untouched(conv, nn.Conv2d)
    )

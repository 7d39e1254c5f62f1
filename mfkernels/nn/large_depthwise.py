from typing import TypeGuard

import torch
from torch import Tensor, nn

from .. import backends, ops
from .inputs import has_hooks


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(x)`; in training on a CPU, a depthwise convolution with a large kernel by ours: the gradient of
    its weights takes PyTorch ten times as long."""
    if not torch.is_grad_enabled() or not _is_large(conv) or not _trains(conv, x):
        return conv(x)
    none = conv.weight.new_empty(0, *conv.weight.shape), x.new_empty(x.shape[0], 0)
    return ops.dynamic_conv2d(
        x, conv.weight, *none, conv.bias, padding=conv.kernel_size[0] // 2, groups=conv.groups
    )


def _is_large(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size in ((5, 5), (7, 7))
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.padding_mode == "zeros"
    )


def _trains(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        conv.weight.requires_grad
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.is_contiguous()
        and x.dtype == conv.weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and not has_hooks(conv)
        and backends.use_kernels("dynamic_conv2d", x)
    )

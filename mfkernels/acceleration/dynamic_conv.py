"""Replace convolutions with kernels mixed for each sample.

The classes are DynamicConv of EfficientAT, Dynamic_conv2d of Dynamic-convolution-Pytorch, and CondConv2d of
timm.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .override import Override, override
from .settings import Found, random_inputs

Pair = tuple[int, int]


class _Mixed(Override):
    weight: Tensor
    bias: Tensor | None
    stride: int | Pair
    padding: int | Pair
    dilation: int | Pair
    groups: int

    def convolve(self, x: Tensor, basis: Tensor, attention: Tensor) -> Tensor:
        """`x` by the mix of the kernels (K, O, C / groups, kh, kw) by attention (B, K)."""
        bias = self.bias
        if torch.is_autocast_enabled(x.device.type):  # as theirs, whose products take this dtype
            dtype = torch.get_autocast_dtype(x.device.type)
            x, basis, attention = x.to(dtype), basis.to(dtype), attention.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        static = basis.new_zeros(basis.shape[1:])
        settings = (self.stride, self.padding, self.dilation, self.groups, 1.0)
        return ops.dynamic_conv2d(x, static, basis, attention, None, bias, *settings)


class ContextDynamicConv(_Mixed):
    """Attention from the context of a block of EfficientAT."""

    out_channels: int
    kernel_size: int
    k: int
    temperature: float
    residuals: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, g: tuple[Tensor, ...]) -> Tensor:
        attention = torch.softmax(self.residuals(g[0].flatten(1)) / self.temperature, 1)
        size = self.kernel_size
        return self.convolve(x, self.weight.view(self.k, self.out_channels, -1, size, size), attention)


class SelfDynamicConv(_Mixed):
    """Attention from the map's own mean."""

    attention: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.attention(x))


class RoutedConv(_Mixed):
    """Attention as an argument; perhaps padded as TensorFlow does it, which depends on the map's size."""

    dynamic_padding: bool
    weight_shape: tuple[int, ...]

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        if self.dynamic_padding:
            x = F.pad(x, (*self._same(x, 1), *self._same(x, 0)))
        return self.convolve(x, self.weight.view(-1, *self.weight_shape), routing_weights)

    def _same(self, x: Tensor, axis: int) -> Pair:
        """Zeros before and after a row or column, with which the result has 1 / stride of its pixels."""
        size, kernel = x.shape[2 + axis], self.weight_shape[2 + axis]
        stride, dilation = self.stride[axis], self.dilation[axis]  # type: ignore[index]
        zeros = max(-(size // -stride) * stride - stride + dilation * (kernel - 1) + 1 - size, 0)
        return zeros // 2, zeros - zeros // 2


def _dense(inputs: int, taps: int) -> bool:
    """Return whether PyTorch's grouped convolution, which these classes call, is faster than our kernels.

    It is faster for kernels larger than 1x1 of several dozen inputs, though its results are less exact.
    """
    return taps > 1 and 32 <= inputs < 512


def context_dynamic_conv(old: Any) -> Found:
    if type(old).__name__ != "DynamicConv" or not hasattr(old, "residuals"):
        return None
    if _dense(old.in_channels // old.groups, old.kernel_size**2):
        return None
    shapes = (2, old.in_channels, 12, 13), (2, old.residuals[0].in_features, 1, 1)

    def inputs() -> tuple:
        x, context = random_inputs(*shapes)
        return x, (context,)

    return override(ContextDynamicConv, old), inputs


def self_dynamic_conv(old: Any) -> Found:
    if type(old).__name__ != "Dynamic_conv2d" or _dense(old.weight.shape[2], old.weight[0, 0, 0].numel()):
        return None
    return override(SelfDynamicConv, old), lambda: random_inputs((2, old.in_planes, 12, 13))


def routed_conv(old: Any) -> Found:
    if type(old).__name__ != "CondConv2d":
        return None
    _, inputs, *kernel = old.weight_shape
    if _dense(inputs, kernel[0] * kernel[1]):
        return None
    shapes = (2, old.in_channels, 12, 13), (2, old.num_experts)
    return override(RoutedConv, old), lambda: random_inputs(*shapes)


RULES = (context_dynamic_conv, self_dynamic_conv, routed_conv)

"""The block of EfficientAT's DyMN, beside its convolutions and activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import normalize
from .override import Override, override
from .settings import Found, random_inputs


class ContextBlock(Override):
    """Its norms by our kernels, which train faster."""

    context_gen: Callable[..., tuple[Tensor, ...]]
    exp_conv: Callable[..., Tensor]
    exp_act: Callable[..., Tensor]
    depth_conv: Callable[..., Tensor]
    depth_act: Callable[..., Tensor]
    proj_conv: Callable[..., Tensor]
    ca: Callable[..., Tensor]
    exp_norm: nn.Module
    depth_norm: nn.Module
    proj_norm: nn.Module
    use_res_connect: bool

    def forward(self, x: Tensor, g: object = None) -> Tensor:
        context = self.context_gen(x, g)
        y = self.exp_act(normalize(self.exp_norm, self.exp_conv(x, context)), context)
        y = self.depth_act(normalize(self.depth_norm, self.depth_conv(y, context)), context)
        y = normalize(self.proj_norm, self.proj_conv(self.ca(y, context), context))
        return y + x if self.use_res_connect else y


class ContextMeans(Override):
    """Sums of rows and of columns, which adaptive pooling makes pixel by pixel."""

    joint_conv: Callable[[Tensor], Tensor]
    joint_norm: Callable[[Tensor], Tensor]
    joint_act: Callable[[Tensor], Tensor]
    conv_f: Callable[[Tensor], Tensor]
    conv_t: Callable[[Tensor], Tensor]
    pool_f: Callable[[Tensor], Tensor]
    pool_t: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, g: object = None) -> tuple[Tensor, ...]:
        both = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        both = self.joint_act(self.joint_norm(self.joint_conv(both)))
        rows, columns = both.split([x.shape[2], x.shape[3]], 2)
        rows, columns = self.pool_f(rows), self.pool_t(columns.transpose(2, 3))
        return both.mean(2, keepdim=True), self.conv_f(rows), self.conv_t(columns)


class CoordinateGate(Override):
    """In inference the second product takes no memory of its own."""

    def forward(self, x: Tensor, g: tuple[Tensor, ...]) -> Tensor:
        rows, columns = g[1].sigmoid(), g[2].sigmoid()
        y = x * rows
        return y * columns if torch.is_grad_enabled() else y.mul_(columns)


def block(old: Any) -> Found:
    if type(old).__name__ != "DY_Block":
        return None
    channels = old.context_gen.joint_conv.in_channels
    return override(ContextBlock, old), lambda: random_inputs((2, channels, 12, 13))


def context(old: Any) -> Found:
    if type(old).__name__ != "ContextGen":
        return None
    channels = old.joint_conv.in_channels
    return override(ContextMeans, old), lambda: random_inputs((2, channels, 12, 13), (0,))


def coordinate_gate(old: Any) -> Found:
    if type(old).__name__ != "CoordAtt" or any(True for _ in old.children()):
        return None  # another one, with layers of its own

    def inputs() -> tuple:
        x, *gates = random_inputs((2, 8, 5, 6), (2, 8, 1, 1), (2, 8, 5, 1), (2, 8, 1, 6))
        return x, tuple(gates)

    return override(CoordinateGate, old), inputs


RULES = (block, context, coordinate_gate)

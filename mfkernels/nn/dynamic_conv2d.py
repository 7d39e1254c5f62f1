from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .kernel_attention import KernelAttention
from .replacement import Replacement


class DynamicResidualConv2d(Replacement):
    """Convolve with a static kernel plus a tenth of a mix of K others.

    A token and the map itself choose the mix.

    Args:
        in_channels, out_channels: C and O, divisible by `groups`.
        kernel_size: k; the map keeps its size at stride 1 (padding k // 2).
        token_dim: d.
        num_kernels: K.
        stride, groups: as of `nn.Conv2d`. The released code has stride 1 only.
        temperature, activation: of the `KernelAttention`.
        basis: what the K kernels begin as, "zeros" or "random" (each as the static one).

    Inputs:
        x (B, C, H, W) and token (B, d).

    Returns:
        (B, O, H', W').

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Dynamic_Residual_Conv2d`. Where the K kernels begin as zeros, they alone, and not
    their attention, learn in the first step.
    Source: Yun and Ro, Dynamic Mobile-Former, equations 3 and 4; the tenth from the released code.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        token_dim: int,
        num_kernels: int,
        stride: int = 1,
        groups: int = 1,
        temperature: float = 1.0,
        activation: str = "sigmoid",
        basis: str = "zeros",
    ) -> None:
        super().__init__()
        if basis not in ("zeros", "random"):
            raise ValueError(f"DynamicResidualConv2d: basis must be 'zeros' or 'random', got {basis!r}")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"DynamicResidualConv2d: groups must be positive and divide {in_channels} and "
                f"{out_channels} channels, got {groups}"
            )
        self.stride, self.padding, self.groups = stride, kernel_size // 2, groups
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.Kernel_Attention = KernelAttention(
            in_channels, token_dim, num_kernels, temperature=temperature, activation=activation
        )
        self.static_weight = nn.Parameter(torch.empty(shape))
        self.weight = nn.Parameter(torch.zeros(num_kernels, *shape))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)  # where a batch norm is folded, it has one
        nn.init.kaiming_uniform_(self.static_weight)
        if basis == "random":
            for kernel in self.weight:
                nn.init.kaiming_uniform_(kernel)

    def forward(self, x: Tensor, token: Tensor, *mean: Tensor) -> Tensor:
        attention = self.Kernel_Attention(x, token, *mean)
        return ops.dynamic_conv2d(
            *(x, self.static_weight, self.weight, attention, self.bias),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """With five dimensions the kernels would make `to(memory_format=torch.channels_last)` fail."""

        def with_four(t: Tensor) -> Tensor:
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.dim() == 5 else fn(t)

        return super()._apply(with_four, recurse)

    def extra_repr(self) -> str:
        outputs, inputs, size, _ = self.static_weight.shape
        return (
            f"{inputs * self.groups}, {outputs}, kernel_size={size}, num_kernels={self.weight.shape[0]}, "
            f"stride={self.stride}, groups={self.groups}"
        )

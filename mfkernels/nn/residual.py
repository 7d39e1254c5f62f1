import torch
from torch import Tensor, nn

from .conv_bn import ConvBN, conv_like
from .drop_path import DropPath


class Residual(nn.Module):
    """`x + gamma * drop_path(m(x))`.

    Args:
        m: any module that keeps the shape of a feature map.
        drop_path: rate of stochastic depth.
        layer_scale: gamma, (1, C, 1, 1), begins with this; 0 for no gamma.
        channels: C; needed with `layer_scale`.

    State: the released iFormer's `Residual`: `m.*` and `gamma`.
    """

    def __init__(
        self, m: nn.Module, *, drop_path: float = 0.0, layer_scale: float = 0.0, channels: int | None = None
    ) -> None:
        super().__init__()
        self.gamma: nn.Parameter | None = None
        if layer_scale > 0:
            if channels is None:
                raise ValueError("Residual: layer_scale needs channels, got None")
            self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), layer_scale))
        self.m = m
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.m(x))
        return x + (y if self.gamma is None else self.gamma * y)

    def fuse(self) -> nn.Module:
        """Itself; but one convolution where `m` is a depthwise convolution that keeps the map's size."""
        if not isinstance(self.m, ConvBN) or self.gamma is not None:
            return self
        conv = self.m.fuse()
        size, padding = conv.kernel_size[0], conv.padding
        if conv.groups != conv.in_channels or conv.stride != (1, 1) or padding != (size // 2, size // 2):
            return self
        assert conv.bias is not None
        weight = conv.weight.detach().clone()
        weight[:, :, size // 2, size // 2] += 1
        return conv_like(conv, weight, conv.bias)

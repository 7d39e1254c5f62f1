"""The convolutions of Mobile, each with its batch norm, as the released networks number them."""

import torch
from torch import Tensor, nn

from .fused_sequential import FusedSequential


def depthwise_layers(inputs: int, outputs: int, kernel: int, stride: int, kind: str) -> list[nn.Module]:
    """Depthwise convolution(s) and batch norm(s); output o reads input floor(o * inputs / outputs).

    Args:
        kind: "dw": kernel x kernel; "sepdw": 3x1 to half the outputs, then 1x3; "maxdw": `MaxDepthwise`.
    """
    if kind == "dw":
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
        return [conv, nn.BatchNorm2d(outputs)]
    if kind == "sepdw":
        half = outputs // 2
        return [
            nn.Conv2d(inputs, half, (3, 1), (stride, 1), (1, 0), groups=inputs, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, outputs, (1, 3), (1, stride), (0, 1), groups=half, bias=False),
            nn.BatchNorm2d(outputs),
        ]
    if kind == "maxdw":
        return [MaxDepthwise(inputs, outputs, stride)]
    raise ValueError(f"depthwise must be 'dw', 'sepdw' or 'maxdw', got {kind!r}")


def pointwise_layers(inputs: int, outputs: int, groups: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)]


class MaxDepthwise(nn.Module):
    """The element-wise maximum of a 3x1 and a 1x3 depthwise convolution; an ablation of the released code."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()

        def branch(kernel: tuple[int, int], padding: tuple[int, int]) -> FusedSequential:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=inputs, bias=False)
            return FusedSequential(conv, nn.BatchNorm2d(outputs))

        self.conv1 = branch((3, 1), (1, 0))
        self.conv2 = branch((1, 3), (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(self.conv1(x), self.conv2(x))

"""The networks that the papers compare with, in plain PyTorch, random weights.

MobileNetV3-Large 1.0: Howard et al., Searching for MobileNetV3, ICCV 2019, table 1.
ShuffleNetV2 2.0x: Ma et al., ShuffleNet V2, ECCV 2018, table 5.
"""

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: type | None = None):
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = _divisible(channels / 4)
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.expand(torch.relu(self.reduce(pooled))))


def _divisible(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class _Inverted(nn.Module):
    def __init__(self, inputs, kernel, hidden, outputs, squeeze, act, stride) -> None:
        super().__init__()
        layers = [] if hidden == inputs else [_conv(inputs, hidden, 1, act=act)]
        layers += [_conv(hidden, hidden, kernel, stride, hidden, act)]
        layers += [_SqueezeExcite(hidden)] if squeeze else []
        self.layers = nn.Sequential(*layers, _conv(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_v3_large(num_classes: int = 1000) -> nn.Module:
    """5.48 M parameters."""
    relu, swish = nn.ReLU, nn.Hardswish
    rows = [  # kernel, hidden, outputs, squeeze-and-excitation, activation, stride
        (3, 16, 16, False, relu, 1), (3, 64, 24, False, relu, 2), (3, 72, 24, False, relu, 1),
        (5, 72, 40, True, relu, 2), (5, 120, 40, True, relu, 1), (5, 120, 40, True, relu, 1),
        (3, 240, 80, False, swish, 2), (3, 200, 80, False, swish, 1), (3, 184, 80, False, swish, 1),
        (3, 184, 80, False, swish, 1), (3, 480, 112, True, swish, 1), (3, 672, 112, True, swish, 1),
        (5, 672, 160, True, swish, 2), (5, 960, 160, True, swish, 1), (5, 960, 160, True, swish, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = [_conv(3, 16, 3, 2, act=swish)]
    channels = 16
    for kernel, hidden, outputs, squeeze, act, stride in rows:
        layers.append(_Inverted(channels, kernel, hidden, outputs, squeeze, act, stride))
        channels = outputs
    layers += [_conv(channels, 960, 1, act=swish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        *layers, nn.Linear(960, 1280), swish(), nn.Dropout(0.2), nn.Linear(1280, num_classes)
    )


class _Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        right = inputs if stride == 2 else half
        self.stride = stride
        self.right = nn.Sequential(
            _conv(right, half, 1, act=nn.ReLU),
            _conv(half, half, 3, stride, half),
            _conv(half, half, 1, act=nn.ReLU),
        )
        if stride == 2:
            self.left = nn.Sequential(
                _conv(inputs, inputs, 3, 2, inputs), _conv(inputs, half, 1, act=nn.ReLU)
            )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.left(x), x) if self.stride == 2 else x.chunk(2, 1)
        both = torch.stack([left, self.right(right)], 2)  # the shuffle of two groups
        return both.flatten(1, 2)


def shufflenet_v2_2x(num_classes: int = 1000) -> nn.Module:
    """7.39 M parameters."""
    layers: list[nn.Module] = [_conv(3, 24, 3, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    channels = 24
    for outputs, repeat in ((244, 4), (488, 8), (976, 4)):
        for i in range(repeat):
            layers.append(_Unit(channels, outputs, 2 if i == 0 else 1))
            channels = outputs
    layers += [_conv(channels, 2048, 1, act=nn.ReLU), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2048, num_classes))

"""Dynamic ReLUs and convolutions with the class names, attributes and parameter names that others gave them,
written plainly for these tests: what `accelerate` recognises. Those of DyMN are in lookalikes_dymn.py."""

import torch
from torch import nn
from torch.nn import functional as F


class _SelfDyReLU(nn.Module):
    """max_k(a_k x + b_k), the coefficients from the mean of x; one set of them for `sets` channels."""

    def __init__(self, channels, sets, reduction, k, conv_type):
        super().__init__()
        self.channels, self.k, self.conv_type = channels, k, conv_type
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(channels // reduction, 2 * k * sets)
        self.sigmoid = nn.Sigmoid()
        self.register_buffer("lambdas", torch.tensor([1.0] * k + [0.5] * k))
        self.register_buffer("init_v", torch.eye(2 * k)[0])

    def get_relu_coefs(self, x):
        return 2 * self.sigmoid(self.fc2(self.relu(self.fc1(x.flatten(2).mean(2))))) - 1

    def forward(self, x):
        theta = self.get_relu_coefs(x).view(len(x), -1, 2 * self.k) * self.lambdas + self.init_v
        lines = [
            x.flatten(2) * theta[:, :, i, None] + theta[:, :, self.k + i, None] for i in range(self.k)
        ]  # each (B, C, pixels)
        return torch.stack(lines).amax(0).view(x.shape)


class DyReLUA(_SelfDyReLU):
    def __init__(self, channels, reduction=4, k=2, conv_type="2d"):
        super().__init__(channels, 1, reduction, k, conv_type)


class DyReLUB(_SelfDyReLU):
    def __init__(self, channels, reduction=4, k=2, conv_type="2d"):
        super().__init__(channels, channels, reduction, k, conv_type)


class _ConvModule(nn.Module):
    def __init__(self, inputs, outputs, activate):
        super().__init__()
        self.conv, self.activate = nn.Conv2d(inputs, outputs, 1), activate

    def forward(self, x):
        return self.activate(self.conv(x))


class DyReLU(nn.Module):
    """mmdetection's."""

    def __init__(self, channels, ratio=4):
        super().__init__()
        self.channels, self.expansion = channels, 4
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = _ConvModule(channels, channels // ratio, nn.ReLU())
        self.conv2 = _ConvModule(channels // ratio, 4 * channels, nn.Hardsigmoid())

    def forward(self, x):
        theta = self.conv2(self.conv1(self.global_avgpool(x))) - 0.5
        a, b, c, d = theta.split(self.channels, 1)
        return torch.maximum(x * (2 * a + 1) + b, x * (2 * c) + d)


class attention2d(nn.Module):
    def __init__(self, inputs, kernels, temperature):
        super().__init__()
        self.fc1 = nn.Conv2d(inputs, inputs // 4 + 1, 1, bias=False)
        self.fc2 = nn.Conv2d(inputs // 4 + 1, kernels, 1)
        self.temperature = temperature

    def updata_temperature(self):
        self.temperature -= 3

    def forward(self, x):
        scores = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).flatten(1)
        return (scores / self.temperature).softmax(1)


class Dynamic_conv2d(nn.Module):
    def __init__(
        self, inputs, outputs, size, bias=True, stride=1, padding=0, dilation=1, groups=1, kernels=4
    ):
        super().__init__()
        self.in_planes, self.out_planes, self.K = inputs, outputs, kernels
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.attention = attention2d(inputs, kernels, 34)
        self.weight = nn.Parameter(torch.randn(kernels, outputs, inputs // groups, size, size))
        self.bias = nn.Parameter(torch.zeros(kernels, outputs)) if bias else None

    def update_temperature(self):
        self.attention.updata_temperature()

    def forward(self, x):
        attention = self.attention(x)
        return each_its_own(x, self.weight, attention, self.bias, self)


def each_its_own(x, kernels, attention, biases, settings):
    """The samples one by one, each with its mix of the kernels (K, O, ...)."""
    mixed = attention @ kernels.flatten(1)
    bias = [None] * len(x) if biases is None else attention @ biases
    return torch.cat(
        [
            F.conv2d(
                *(x[i : i + 1], mixed[i].view(kernels.shape[1:]), bias[i]),
                *(settings.stride, settings.padding, settings.dilation, settings.groups),
            )
            for i in range(len(x))
        ]
    )

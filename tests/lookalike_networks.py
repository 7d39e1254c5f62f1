"""Whole small networks of the released DMF and iFormer, of the parts in lookalikes.py, written plainly for
these tests: what `deploy` recognises."""

from itertools import pairwise

import torch
from lookalikes import GRN, SHMA, CondConv, DropPath, Former, Mobile2Former
from torch import nn
from torch.nn import functional as F

# --- DMF ----------------------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(1, channels)


class Stem(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, outputs, 3, 2, 1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.gelu(self.bn(self.conv(x)))


class BottleNeck(nn.Module):
    def __init__(self, inputs, hidden, outputs, is_grn=False):
        super().__init__()
        self.pw_conv1, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.dw_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        if is_grn:
            self.grn = GRN(hidden)
        else:
            self.bn2 = nn.BatchNorm2d(hidden)
        self.pw_conv2, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = F.gelu(self.bn1(self.pw_conv1(x)))
        x = self.grn(self.dw_conv(x) + x) if hasattr(self, "grn") else self.bn2(self.dw_conv(x))
        return self.bn3(self.pw_conv2(F.gelu(x)))


class DynamicMobile(nn.Module):
    def __init__(self, inputs, hidden, outputs, width, stride, kernels):
        super().__init__()
        self.kernels = kernels
        if stride == 2:
            conv = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(inputs), nn.GELU())

        def conv(inputs, outputs, size, groups, count):
            if count > 1:
                return CondConv(inputs, outputs, width, size, groups, count)
            return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)

        self.pw_conv1, self.bn1 = conv(inputs, hidden, 1, 2, kernels[0]), nn.BatchNorm2d(hidden)
        self.dw_conv, self.bn2 = conv(hidden, hidden, 3, hidden, kernels[1]), nn.BatchNorm2d(hidden)
        self.pw_conv2, self.bn3 = conv(hidden, outputs, 1, 2, kernels[0]), nn.BatchNorm2d(outputs)

    def forward(self, x, token):
        pointwise, depthwise = ((token,) if count > 1 else () for count in self.kernels)
        x = self.downsample(x) if hasattr(self, "downsample") else x
        x = F.gelu(self.bn1(self.pw_conv1(x, *pointwise)))
        x = F.gelu(self.bn2(self.dw_conv(x, *depthwise)))
        return self.bn3(self.pw_conv2(x, *pointwise))


class DMFBlock(nn.Module):
    def __init__(self, inputs, hidden, outputs, width, stride, kernels, rate):
        super().__init__()
        self.drop_path, self.norm = DropPath(rate), GroupNorm(outputs)
        self.dynamic_mobile = DynamicMobile(inputs, hidden, outputs, width, stride, kernels)
        self.former, self.mobile2former = Former(width, rate), Mobile2Former(inputs, width, rate=rate)
        self.ffn = BottleNeck(outputs, int(2.7 * outputs), outputs, is_grn=True)

    def forward(self, pair):
        x, tokens = pair
        tokens = self.former(self.mobile2former(x, tokens))
        x = self.dynamic_mobile(x, tokens[:, 0])
        return x + self.drop_path(self.ffn(self.norm(x))), tokens


class Head(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels + width, 24), nn.Linear(24, 5)

    def forward(self, x, tokens):
        return self.fc2(F.hardswish(self.fc1(torch.cat([x.mean((2, 3)), tokens[:, 0]], 1))))


class DynamicMobileFormer(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, 32))
        self.stem, self.lite_bottleneck = Stem(8), BottleNeck(8, 12, 6)
        blocks = [(6, 20, 12, 32, 2, (4, 4), rate), (12, 20, 12, 32, 1, (1, 4), rate)]
        self.blocks = nn.ModuleList(DMFBlock(*row) for row in blocks)
        self.end_mobile2former, self.end_former = Mobile2Former(12, 32, rate=rate), Former(32, rate)
        self.channel_conv, self.bn = CondConv(12, 18, 32, kernels=1), nn.BatchNorm2d(18)
        self.head = Head(18, 32)

    def forward(self, x):
        pair = self.lite_bottleneck(self.stem(x)), self.tokens.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            pair = block(pair)
        tokens = self.end_former(self.end_mobile2former(*pair))
        return self.head(F.gelu(self.bn(self.channel_conv(pair[0], tokens[:, 0]))), tokens)


# --- iFormer ------------------------------------------------------------------------------------------------


class Conv2d_BN(nn.Sequential):
    def __init__(self, inputs, outputs, size=1, stride=1, groups=1):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.add_module("c", conv)
        self.add_module("bn", nn.BatchNorm2d(outputs))


class BN_Linear(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(inputs))
        self.add_module("l", nn.Linear(inputs, outputs))


class Residual(nn.Module):
    def __init__(self, m, rate=0.0, channels=0):
        super().__init__()
        self.m, self.drop_path = m, DropPath(rate)
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1)) if channels else None

    def forward(self, x):
        y = self.drop_path(self.m(x))
        return x + (y if self.gamma is None else self.gamma * y)


class EdgeResidual(nn.Module):
    def __init__(self, inputs, outputs, size):
        super().__init__()
        self.conv_exp_bn1 = Conv2d_BN(inputs, 4 * inputs, size, 2)
        self.conv_pwl_bn2 = Conv2d_BN(4 * inputs, outputs)

    def forward(self, x):
        return self.conv_pwl_bn2(F.gelu(self.conv_exp_bn1(x)))


class ConvBlock(nn.Module):
    def __init__(self, channels, rate):
        super().__init__()
        depthwise, last = Conv2d_BN(channels, channels, 5, groups=channels), Conv2d_BN(3 * channels, channels)
        layers = nn.Sequential(depthwise, Conv2d_BN(channels, 3 * channels), nn.GELU(), last)
        self.token_channel_mixer = Residual(layers, rate, channels)

    def forward(self, x):
        return self.token_channel_mixer(x)


class FFN2d(nn.Module):
    def __init__(self, channels, rate):
        super().__init__()
        first, last = Conv2d_BN(channels, 2 * channels), Conv2d_BN(2 * channels, channels)
        self.channel_mixer = Residual(nn.Sequential(first, nn.GELU(), last), rate, channels)

    def forward(self, x):
        return self.channel_mixer(x)


class RepCPE(nn.Module):
    def __init__(self, channels, rate):
        super().__init__()
        self.cpe = Residual(Conv2d_BN(channels, channels, 3, groups=channels))

    def forward(self, x):
        return self.cpe(x)


class SHMABlock(nn.Module):
    def __init__(self, channels, rate):
        super().__init__()
        self.window_split = self.window_reverse = False
        self.token_channel_mixer = Residual(SHMA(channels), rate, channels)

    def forward(self, x):
        return self.token_channel_mixer(x)


class BasicBlock(nn.Module):
    def __init__(self, kind, channels, rate):
        super().__init__()
        self.block = kind(channels, rate)

    def forward(self, x):
        return self.block(x)


class Classfier(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.classifier, self.distillation = BN_Linear(channels, 5), False

    def forward(self, x):
        return self.classifier(x)


class iFormer(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.use_bn, self.last_proj, dims = True, False, (8, 12, 16, 20)
        stem = nn.Sequential(Conv2d_BN(3, 4, 5, 2), nn.GELU(), EdgeResidual(4, 8, 5))
        halvings = [nn.Sequential(Conv2d_BN(i, o, 3, 2)) for i, o in pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        kinds = [[ConvBlock], [ConvBlock], [RepCPE, SHMABlock, FFN2d], [SHMABlock]]
        self.stages = nn.ModuleList(
            nn.Sequential(*(BasicBlock(kind, channels, rate) for kind in stage))
            for stage, channels in zip(kinds, dims, strict=True)
        )
        self.classifier = Classfier(dims[-1])

    def forward(self, x):
        for halve, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(halve(x))
        return self.classifier(x.mean((2, 3)))

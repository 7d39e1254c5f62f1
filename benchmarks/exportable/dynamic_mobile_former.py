"""Dynamic Mobile-Former."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mfkernels.models.dynamic_mobile_former import DynamicMobileFormer
from mfkernels.nn import DMFBlock, DMFFormer, DMFMobileToFormer, DynamicResidualConv2d, InvertedResidualFFN
from mfkernels.nn.conv_bn import affine

from .layers import Gather, by_head, folded, linear, scaled, sizes


class ExportableDynamicMobileFormer(nn.Module):
    """A Dynamic Mobile-Former."""

    def __init__(self, model: DynamicMobileFormer) -> None:
        super().__init__()
        self.tokens = nn.Parameter(model.tokens.detach().clone())
        lite = model.lite_bottleneck
        layers = [(model.stem.conv, model.stem.bn, nn.GELU()), (lite.pw_conv1, lite.bn1, nn.GELU())]
        layers += [(lite.dw_conv, lite.bn2, nn.GELU()), (lite.pw_conv2, lite.bn3)]
        self.stem = folded(layer for part in layers for layer in part)
        self.blocks = nn.ModuleList(_Block(block) for block in model.blocks)
        self.gather, self.former = _MobileToFormer(model.end_mobile2former), _Former(model.end_former)
        self.conv = _convolution(model.channel_conv, model.bn)
        self.fc1, self.fc2 = copy.deepcopy(model.head.fc1), copy.deepcopy(model.head.fc2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens.expand(int(x.shape[0]), -1, -1)
        x = self.stem(x)
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.former(self.gather(x, tokens))
        x = F.gelu(self.conv(x, tokens[:, 0]))
        both = torch.cat([x.mean((2, 3)), tokens[:, 0]], 1)
        return self.fc2(F.hardswish(self.fc1(both)))


class _Block(nn.Module):
    def __init__(self, block: DMFBlock) -> None:
        super().__init__()
        mobile = block.dynamic_mobile
        self.gather, self.former = _MobileToFormer(block.mobile2former), _Former(block.former)
        self.halve = folded(getattr(mobile, "downsample", ()))
        self.widen = _convolution(mobile.pw_conv1, mobile.bn1)
        self.depthwise = _convolution(mobile.dw_conv, mobile.bn2)
        self.narrow = _convolution(mobile.pw_conv2, mobile.bn3)
        self.ffn = _FeedForward(block.norm, block.ffn)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.former(self.gather(x, tokens))
        token, x = tokens[:, 0], self.halve(x)
        x = F.gelu(self.widen(x, token))
        x = F.gelu(self.depthwise(x, token))
        x = self.narrow(x, token)
        return x + self.ffn(x), tokens


def _convolution(conv: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    return _Dynamic(conv, norm) if isinstance(conv, DynamicResidualConv2d) else _Static(conv, norm)


class _Static(nn.Module):
    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(conv, norm)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        return self.conv(x)


class _Dynamic(nn.Module):
    """A dynamic convolution and its batch norm as one convolution, the samples being groups of channels."""

    def __init__(self, conv: DynamicResidualConv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = affine(norm)
        factor = scale.view(-1, 1, 1, 1)
        weight, basis = conv.static_weight.detach() * factor, conv.weight.detach() * factor * 0.1
        self.shape, self.groups = tuple(weight.shape), conv.groups
        self.stride, self.padding = conv.stride, conv.padding
        self.mix = linear(basis.flatten(1).T, weight.flatten())
        self.bias = nn.Parameter(shift.float())
        attention = conv.Kernel_Attention
        first = fuse_conv_bn_eval(attention.net1, attention.bn)
        last = attention.net2.weight.detach().flatten(1) / attention.temperature
        self.scores = nn.Sequential(linear(first.weight.flatten(1), first.bias), nn.ReLU(), linear(last))
        self.softmax = attention.activation == "softmax"

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        batch, channels, height, width = sizes(x)
        scores = self.scores(torch.cat([token, x.mean((2, 3))], 1))
        kernels = self.mix(torch.softmax(scores, 1) if self.softmax else torch.sigmoid(scores))
        outputs, *rest = self.shape
        y = F.conv2d(
            x.reshape(1, batch * channels, height, width),
            kernels.reshape(batch * outputs, *rest),
            None,
            self.stride,
            self.padding,
            groups=batch * self.groups,
        )
        return y.reshape(batch, outputs, *sizes(y)[2:]) + self.bias.view(1, -1, 1, 1)


class _FeedForward(nn.Module):
    """The group norm's factors are folded into the convolution after it."""

    def __init__(self, norm: nn.GroupNorm, ffn: InvertedResidualFFN) -> None:
        super().__init__()
        self.eps, self.mean, self.norm_eps = norm.eps, ffn.grn.mean, ffn.grn.eps
        self.channels = norm.num_channels
        self.widen = fuse_conv_bn_eval(ffn.pw_conv1, ffn.bn1)
        with torch.no_grad():
            self.widen.bias += self.widen.weight.flatten(1) @ norm.bias
            self.widen.weight *= norm.weight.view(1, -1, 1, 1)
        self.depthwise = copy.deepcopy(ffn.dw_conv)
        with torch.no_grad():
            self.depthwise.weight[:, :, 1, 1] += 1  # the shortcut
        self.gamma, self.beta = copy.deepcopy(ffn.grn.gamma), copy.deepcopy(ffn.grn.beta)
        self.narrow = fuse_conv_bn_eval(ffn.pw_conv2, ffn.bn3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.widen(F.group_norm(x, 1, eps=self.eps)))
        x = self.depthwise(x)
        norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        means = norms.mean(1, keepdim=True) if self.mean == "channels" else norms
        response = norms / (means + self.norm_eps)
        return self.narrow(F.gelu(x * (self.gamma * response + 1) + self.beta))


class _MobileToFormer(nn.Module):
    def __init__(self, bridge: DMFMobileToFormer) -> None:
        super().__init__()
        self.norm, self.fc = copy.deepcopy(bridge.norm), copy.deepcopy(bridge.fc)
        self.gather = Gather(bridge.q, bridge.num_heads)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        return self.fc(self.gather(x, tokens)) + tokens


class _Former(nn.Module):
    def __init__(self, former: DMFFormer) -> None:
        super().__init__()
        attention, mlp = former.token_attention, former.mlp
        self.heads = attention.num_heads
        q, k, v = attention.qkv.weight.detach().chunk(3)
        self.q, self.k, self.v = scaled(linear(q), (q.shape[0] // self.heads) ** -0.5), linear(k), linear(v)
        self.proj = copy.deepcopy(attention.proj)
        self.norm1, self.norm2 = copy.deepcopy(former.norm1), copy.deepcopy(former.norm2)
        self.mlp = nn.Sequential(copy.deepcopy(mlp.fc1), nn.GELU(), copy.deepcopy(mlp.fc2))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm1(tokens)
        q, k, v = (by_head(layer(normal), self.heads) for layer in (self.q, self.k, self.v))
        out = torch.softmax(q @ k.transpose(2, 3), -1) @ v
        tokens = tokens + self.proj(out.transpose(1, 2).reshape(sizes(tokens)))
        return tokens + self.mlp(self.norm2(tokens))

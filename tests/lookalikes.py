"""Small networks with the class names, attributes and parameter names of the released code, written plainly
for these tests: what `accelerate` recognises."""

import torch
from torch import nn
from torch.nn import functional as F


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.bernoulli(torch.full((x.shape[0],) + (1,) * (x.dim() - 1), keep)).to(x) / keep


# --- Mobile-Former ------------------------------------------------------------------------------------------


class h_sigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3) / 6


def heads_of(tokens, count):
    return tokens.unflatten(-1, (count, -1)).permute(1, 2, 0, 3)  # (B, heads, T, c)


class Local2Global(nn.Module):
    def __init__(self, channels, width, tokens, rate=0.0):
        super().__init__()
        self.num_heads, self.token_num, self.block = 2, tokens, "attn"
        self.use_dynamic, self.remove_proj_local = True, True
        self.alpha = nn.Sequential(nn.Linear(width, channels), h_sigmoid())
        self.q = nn.Linear(width, channels)
        self.proj = nn.Linear(channels, width)
        self.layer_norm = nn.LayerNorm(width)
        self.drop_path = DropPath(rate)

    def forward(self, pair):
        x, tokens = pair
        pixels = x.flatten(2).unflatten(1, (2, -1))  # (B, heads, c, N)
        logits = heads_of(self.q(tokens), 2) @ pixels * pixels.shape[2] ** -0.5
        out = logits.softmax(-1) @ pixels.transpose(2, 3)
        out = out.permute(2, 0, 1, 3).flatten(2) * (2 * self.alpha(tokens))
        return self.layer_norm(tokens + self.drop_path(self.proj(out))), logits.unflatten(-1, x.shape[2:])


class GlobalBlock(nn.Module):
    def __init__(self, width, tokens, rate=0.0):
        super().__init__()
        self.num_heads, self.token_num, self.block, self.use_dynamic, self.use_ffn = (
            4,
            tokens,
            "attn",
            False,
            True,
        )
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.ffn_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.channel_mlp = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.drop_path = DropPath(rate)

    def forward(self, tokens):
        keys = heads_of(tokens, 4)
        weights = (heads_of(self.q(tokens), 4) @ keys.transpose(2, 3) * keys.shape[3] ** -0.5).softmax(-1)
        out = (weights @ keys).permute(2, 0, 1, 3).flatten(2)
        tokens = self.layer_norm(tokens + self.drop_path(self.channel_mlp(out)))
        return self.ffn_norm(tokens + self.ffn(tokens))


class Global2Local(nn.Module):
    def __init__(self, channels, width, tokens, rate=0.0):
        super().__init__()
        self.num_heads, self.token_num, self.block = 2, tokens, "attn"
        self.use_dynamic, self.remove_proj_local = False, True
        self.k = nn.Linear(width, channels)
        self.proj = nn.Linear(width, channels)
        self.drop_path = DropPath(rate)

    def forward(self, pair):
        x, tokens = pair
        pixels = x.flatten(2).unflatten(1, (2, -1)).transpose(2, 3)  # (B, heads, N, c)
        weights = (pixels @ heads_of(self.k(tokens), 2).transpose(2, 3) * pixels.shape[3] ** -0.5).softmax(-1)
        out = (weights @ heads_of(self.proj(tokens), 2)).transpose(2, 3).reshape(x.shape)
        return x + self.drop_path(out)


class HyperFunc(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.sel_token_id = 0
        self.hyper = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, outputs), h_sigmoid()
        )

    def forward(self, tokens):
        return self.hyper(tokens[0])[..., None, None]


class DyReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_func, self.scale = 2, 2.0

    def forward(self, x, theta):
        first, second = theta.chunk(2, 1)
        return torch.maximum(x * 2 * first, x * (2 * second - 1))


def conv_bn(inputs, outputs, size=1, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.Sequential())


class Dna(nn.Module):
    def __init__(self, inputs, outputs, stride, width, tokens, rate):
        super().__init__()
        self.stride, self.hyper_token_id, self.se_flag = stride, 0, [2, 0, 2, 0]
        self.use_conv_alone, self.gbr_before_skip = False, False
        self.identity = stride == 1 and inputs == outputs
        self.layers(inputs, outputs, stride, width)
        self.drop_path = DropPath(rate)
        self.local_global = Local2Global(inputs, width, tokens, rate)
        self.global_block = GlobalBlock(width, tokens, rate)
        self.global_local = Global2Local(outputs, width, tokens, rate)

    def forward(self, pair):
        x, tokens = pair
        if self.use_conv_alone:
            return self.conv(x) + (x if self.identity else 0), tokens
        tokens = self.global_block(self.local_global((x, tokens))[0])
        return self.mobile(x, tokens), tokens


class DnaBlock(Dna):
    def layers(self, inputs, outputs, stride, width):
        hidden = 3 * inputs
        self.conv1, self.act1, self.hyper1 = conv_bn(inputs, hidden), DyReLU(), HyperFunc(width, 2 * hidden)
        self.conv2 = conv_bn(hidden, hidden, 3, stride, hidden)[:2]
        self.act2, self.hyper2, self.conv3 = DyReLU(), HyperFunc(width, 2 * hidden), conv_bn(hidden, outputs)

    def mobile(self, x, tokens):
        out = self.act1(self.conv1(x), self.hyper1(tokens))
        out = self.conv3(self.act2(self.conv2(out), self.hyper2(tokens)))
        return self.global_local((self.drop_path(out) + x if self.identity else out, tokens))


class DnaBlock3(Dna):
    def layers(self, inputs, outputs, stride, width):
        hidden, other = 3 * inputs, 2 * outputs
        self.conv1, self.act1 = conv_bn(inputs, hidden, 3, stride, inputs), DyReLU()
        self.hyper1, self.conv2 = HyperFunc(width, 2 * hidden), conv_bn(hidden, outputs)[:2]
        self.conv3, self.act3 = conv_bn(outputs, other, 3, 1, outputs), DyReLU()
        self.hyper3, self.conv4 = HyperFunc(width, 2 * other), conv_bn(other, outputs)[:2]

    def mobile(self, x, tokens):
        middle = self.conv2(self.act1(self.conv1(x), self.hyper1(tokens)))
        out = self.conv4(self.act3(self.conv3(middle), self.hyper3(tokens)))
        return self.global_local((self.drop_path(out) + middle, tokens))


def lite_block(inputs, outputs):
    """A DnaBlock3 of convolutions alone."""
    block = DnaBlock3.__new__(DnaBlock3)
    nn.Module.__init__(block)
    block.use_conv_alone, block.stride, block.identity = True, 1, inputs == outputs
    (depthwise, norm, _), pointwise = conv_bn(inputs, 2 * inputs, 3, 1, inputs), conv_bn(2 * inputs, outputs)
    block.conv = nn.Sequential(depthwise, norm, nn.ReLU6(), nn.Sequential(), *pointwise[:2])
    return block


class h_swish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


class MergeClassifier(nn.Module):
    def __init__(self, channels, width, features, classes):
        super().__init__()
        self.cls_token_num, self.last_act, self.drop_branch = 1, "relu", [0.0, 0.0]
        self.conv = nn.Sequential(nn.Sequential(), *conv_bn(channels, 6 * channels)[:2])
        joined = 6 * channels + width
        self.fc = nn.Sequential(nn.Linear(joined, features), nn.BatchNorm1d(features), h_swish())
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(features, classes))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), h_swish())

    def forward(self, pair):
        x, tokens = pair
        pooled = self.pool(F.relu6(self.conv(x))).flatten(1)
        return self.classifier(self.fc(torch.cat([pooled, tokens[0]], 1)))


class MobileFormer(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.tokens = nn.Embedding(3, 16)
        self.stem = nn.Sequential(*conv_bn(3, 8, 3, 2)[:2], nn.ReLU6())
        self.features = nn.Sequential(
            lite_block(8, 8),
            DnaBlock3(8, 12, 2, 16, 3, rate),
            DnaBlock(12, 12, 1, 16, 3, rate),
            DnaBlock(12, 16, 1, 16, 3, rate),
        )
        self.local_global = Local2Global(16, 16, 3, rate)
        self.classifier = MergeClassifier(16, 16, 24, 5)

    def forward(self, x):
        tokens = self.tokens.weight[:, None].repeat(1, x.shape[0], 1)
        x, tokens = self.features((self.stem(x), tokens))
        return self.classifier((x, self.local_global((x, tokens))[0]))


# --- DMF ----------------------------------------------------------------------------------------------------


class KernelAttention(nn.Module):
    def __init__(self, channels, width, kernels):
        super().__init__()
        self.temperature = 1.0
        self.net1 = nn.Conv2d(channels + width, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.net2 = nn.Conv2d(width, kernels, 1, bias=False)

    def update_temperature(self, temperature):
        self.temperature = temperature

    def forward(self, x, token):
        both = torch.cat([token[..., None, None], F.adaptive_avg_pool2d(x, 1)], 1)
        return torch.sigmoid(self.net2(self.bn(self.net1(both)).relu()).flatten(1) / self.temperature)


class CondConv(nn.Module):
    def __init__(self, inputs, outputs, width, size=1, groups=1, kernels=4):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size, self.groups = inputs, outputs, size, groups
        self.stride, self.padding, self.dilation, self.bias = 1, size // 2, 1, None
        self.Kernel_Attention = KernelAttention(inputs, width, kernels)
        self.static_weight = nn.Parameter(torch.randn(outputs, inputs // groups, size, size))
        self.weight = nn.Parameter(torch.zeros(kernels, *self.static_weight.shape))

    def forward(self, x, token):
        attention = self.Kernel_Attention(x, token)
        outputs = [
            F.conv2d(
                x[b : b + 1],
                self.static_weight + 0.1 * torch.tensordot(attention[b], self.weight, 1),
                padding=self.padding,
                groups=self.groups,
            )
            for b in range(x.shape[0])
        ]
        return torch.cat(outputs)


class Mobile2Former(nn.Module):
    def __init__(self, channels, width, heads=2, rate=0.0):
        super().__init__()
        self.num_heads = heads
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, channels, bias=False)
        self.fc = nn.Linear(channels, width, bias=False)
        self.drop, self.attn_drop, self.drop_path = nn.Dropout(0.0), nn.Dropout(0.0), DropPath(rate)

    def forward(self, x, tokens):
        tokens = self.norm(tokens)
        pixels = x.flatten(2).unflatten(1, (self.num_heads, -1))
        q = self.q(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        weights = (q @ pixels * pixels.shape[2] ** -0.5).softmax(-1)
        out = (weights @ pixels.transpose(2, 3)).transpose(1, 2).flatten(2)
        return self.drop_path(self.drop(self.fc(out))) + tokens


class Token_Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_heads = width // 32
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, tokens):
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1)
        )
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, tokens):
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens)))))


class Former(nn.Module):
    def __init__(self, width, rate=0.0):
        super().__init__()
        self.token_attention, self.norm1, self.drop_path1 = (
            Token_Attention(width),
            nn.LayerNorm(width),
            DropPath(rate),
        )
        self.mlp, self.norm2, self.drop_path2 = MLP(width), nn.LayerNorm(width), DropPath(rate)

    def forward(self, tokens):
        tokens = tokens + self.drop_path1(self.token_attention(self.norm1(tokens)))
        return tokens + self.drop_path2(self.mlp(self.norm2(tokens)))


class GRN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        norm = x.norm(dim=(2, 3), keepdim=True)
        return self.gamma * x * norm / (norm + 1e-6) + self.beta + x


class DMFLike(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, 32))
        self.stem = conv_bn(3, 8, 3, 2)
        self.mobile2former, self.former = Mobile2Former(8, 32, rate=rate), Former(32, rate)
        self.pw, self.dw = CondConv(8, 16, 32, groups=2), CondConv(16, 16, 32, 3, 16)
        self.grn, self.bn = GRN(16), nn.BatchNorm2d(16)
        self.head = nn.Linear(48, 5)

    def update(self, temperature):
        for module in self.modules():
            if hasattr(module, "update_temperature"):
                module.update_temperature(temperature)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        tokens = self.former(self.mobile2former(x, self.tokens.expand(x.shape[0], -1, -1)))
        x = self.dw(F.gelu(self.pw(x, tokens[:, 0])), tokens[:, 0])
        x = F.gelu(self.grn(self.bn(x)))
        return self.head(torch.cat([x.mean((2, 3)), tokens[:, 0]], 1))


# --- iFormer ------------------------------------------------------------------------------------------------


class Conv2d_BN(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, 1, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


class SHMA(nn.Module):
    def __init__(self, channels, reduction=2):
        super().__init__()
        self.num_heads, self.fused_attn, self.window_size, self.kv_stride = 1, False, 0, 1
        self.scale = (channels // reduction) ** -0.5
        self.q, self.k = (
            Conv2d_BN(channels, channels // reduction),
            Conv2d_BN(channels, channels // reduction),
        )
        self.attn_drop = nn.Dropout(0.0)
        self.proj, self.v_gate = Conv2d_BN(channels, channels), Conv2d_BN(channels, 2 * channels)

    def forward(self, x):
        v, gate = torch.sigmoid(self.v_gate(x)).chunk(2, 1)
        weights = (self.q(x).flatten(2).transpose(1, 2) @ self.k(x).flatten(2) * self.scale).softmax(-1)
        return self.proj((v.flatten(2) @ weights.transpose(1, 2)).view(v.shape) * gate)


class IFormerLike(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.blocks = nn.ModuleList([SHMA(16), SHMA(16, 4)])
        self.drop_path = DropPath(rate)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.drop_path(block(x))
        return self.head(x.mean((2, 3)))

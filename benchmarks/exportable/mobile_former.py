"""Mobile-Former."""

import copy

import torch
from torch import Tensor, nn

from mfkernels.models.mobile_former import MobileFormer
from mfkernels.nn import LiteBottleneck, MobileFormerBlock, MobileFormerDownsample

from .layers import Gather, by_head, folded, scaled, sizes


class ExportableMobileFormer(nn.Module):
    """A Mobile-Former of the released kind; tokens are (B, T, d)."""

    def __init__(self, model: MobileFormer) -> None:
        super().__init__()
        self.tokens = nn.Parameter(model.tokens.weight.detach().clone())
        self.stem = folded(model.stem)
        self.blocks = nn.ModuleList(exportable_block(block) for block in model.features)
        self.bridge = ToFormer(model.local_global)
        head = model.classifier
        if head.class_tokens != 1 or head.act.num_functions:
            raise ValueError("exportable: the head must have one class token and relu6")
        self.conv = folded([*head.conv, nn.ReLU6()])
        self.fc, self.classifier = folded(head.fc), folded(head.classifier)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens.expand(int(x.shape[0]), -1, -1)
        x = self.stem(x)
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.bridge(x, tokens)
        pooled = nn.functional.hardswish(self.conv(x).mean((2, 3)))
        return self.classifier(self.fc(torch.cat([pooled, tokens[:, 0]], 1)))


def exportable_block(block: nn.Module) -> nn.Module:
    if isinstance(block, LiteBottleneck):
        return _Lite(block)
    if not isinstance(block, MobileFormerBlock | MobileFormerDownsample):
        raise ValueError(f"exportable: there is no formulation of {type(block).__name__}")
    return _Block(block)


class _Lite(nn.Module):
    def __init__(self, block: LiteBottleneck) -> None:
        super().__init__()
        self.conv, self.skip = folded(block.conv), block.skip

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return (self.conv(x) + x if self.skip else self.conv(x)), tokens


class _Block(nn.Module):
    """Both blocks with tokens: convolution, dynamic ReLU, convolutions, dynamic ReLU, convolution."""

    def __init__(self, block: MobileFormerBlock | MobileFormerDownsample) -> None:
        super().__init__()
        self.down = isinstance(block, MobileFormerDownsample)
        (first, hyper1), (second, hyper2) = block._generators()
        last = block.act4 if self.down else block.act3
        functions = [act.num_functions for act in (first, second, last)]
        if functions != [2, 2, -1] or block.token_id > 0 or getattr(block, "before_skip", False):
            raise ValueError(
                "exportable: a block must have two dynamic ReLUs, driven by the first token or by all of them"
            )
        self.spatial, self.stride = block.token_id < 0, block.stride
        self.conv1 = folded(block.conv1)
        self.middle = folded(block.conv2)
        self.conv3 = folded(block.conv3)
        self.conv4 = folded(block.conv4) if self.down else nn.Identity()
        self.hyper1, self.hyper2 = DynamicSlopes(hyper1), DynamicSlopes(hyper2)
        self.skip = block.skip
        self.to_former = ToFormer(block.local_global)
        self.former = _Former(block.global_block)
        self.to_mobile = ToMobile(block.global_local)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        new = self.former(self.to_former(x, tokens))
        if self.spatial:
            weights = self.weights(x, tokens)
            first, second = self.hyper1.mixed(new, weights), self.hyper2.mixed(new, weights)
        else:
            first, second = self.hyper1(new[:, 0]), self.hyper2(new[:, 0])
        tokens = new
        middle = self.middle(dynamic_relu(self.conv1(x), *first))
        if self.down:
            out = self.conv4(dynamic_relu(self.conv3(middle), *second)) + middle
            out = self.to_mobile(out, tokens)
            return (out + x if self.skip else out), tokens
        out = self.conv3(dynamic_relu(middle, *second))
        return self.to_mobile(out + x if self.skip else out, tokens), tokens

    def weights(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return the share (B, T, H, W) of each token in the slopes, of the block's output's size."""
        logits = self.to_former.gather.logits(x, tokens).mean(1)
        logits = logits.reshape(*sizes(logits)[:2], *sizes(x)[2:])
        if self.stride == 2:  # what an adaptive pool is here, which exporters refuse for odd sides
            odd = [side % 2 for side in sizes(x)[2:]]
            kernel = [2 + side for side in odd]
            logits = nn.functional.avg_pool2d(logits, kernel, 2, odd, count_include_pad=False)
        return torch.softmax(logits, 1)


def dynamic_relu(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.maximum(x * first, x * second)


class DynamicSlopes(nn.Module):
    """The two slopes (B, C, 1, 1) of a dynamic ReLU, by one token."""

    def __init__(self, hyper: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(hyper.hyper)

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        theta = 2 * self.net(token)[:, :, None, None]
        first, second = theta.split(int(theta.shape[1]) // 2, 1)
        return first, second - 1

    def mixed(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return both slopes (B, C, H, W), mixed of the tokens' by the weights (B, T, H, W)."""
        batch, count, height, width = sizes(weights)
        theta = 2 * self.net(tokens).transpose(1, 2) @ weights.reshape(batch, count, height * width)
        theta = theta.reshape(batch, int(theta.shape[1]), height, width)
        first, second = theta.split(int(theta.shape[1]) // 2, 1)
        return first, second - 1


class ToFormer(nn.Module):
    def __init__(self, bridge: nn.Module) -> None:
        super().__init__()
        if not hasattr(bridge, "alpha") or hasattr(bridge, "mlp") or hasattr(bridge, "k"):
            raise ValueError("exportable: Mobile -> Former must be an attention with a gate")
        self.gather = Gather(bridge.q, bridge.num_heads)
        self.gate, self.proj = copy.deepcopy(bridge.alpha), scaled(bridge.proj, 1.0)
        with torch.no_grad():
            self.proj.weight.mul_(2)  # the gate's factor
        self.norm = copy.deepcopy(bridge.layer_norm)

    def forward(self, x: Tensor, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        gathered = self.gather(x, tokens if position is None else tokens + position)
        return self.norm(tokens + self.proj(gathered * self.gate(tokens)))


class _Former(nn.Module):
    def __init__(self, former: nn.Module) -> None:
        super().__init__()
        if not former._layers() or not hasattr(former, "ffn"):
            raise ValueError("exportable: the Former must be an attention and a feed-forward network")
        self.heads = former.num_heads
        self.query = scaled(former.q, (former.token_dim // self.heads) ** -0.5)
        self.proj, self.norm1 = copy.deepcopy(former.channel_mlp), copy.deepcopy(former.layer_norm)
        self.ffn, self.norm2 = copy.deepcopy(former.ffn), copy.deepcopy(former.ffn_norm)

    def forward(self, tokens: Tensor) -> Tensor:
        keys = by_head(tokens, self.heads)
        out = torch.softmax(by_head(self.query(tokens), self.heads) @ keys.transpose(2, 3), -1) @ keys
        tokens = self.norm1(tokens + self.proj(out.transpose(1, 2).reshape(sizes(tokens))))
        return self.norm2(tokens + self.ffn(tokens))


class ToMobile(nn.Module):
    def __init__(self, bridge: nn.Module) -> None:
        super().__init__()
        if hasattr(bridge, "alpha") or hasattr(bridge, "mlp") or hasattr(bridge, "q"):
            raise ValueError("exportable: Mobile <- Former must be an attention without a gate")
        self.heads = bridge.num_heads
        self.key = scaled(bridge.k, (bridge.channels // self.heads) ** -0.5)
        self.value = copy.deepcopy(bridge.proj)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        batch, channels, height, width = sizes(x)
        pixels = x.reshape(batch, self.heads, channels // self.heads, height * width)
        keys, values = by_head(self.key(tokens), self.heads), by_head(self.value(tokens), self.heads)
        out = torch.softmax(pixels.transpose(2, 3) @ keys.transpose(2, 3), -1) @ values
        return x + out.transpose(2, 3).reshape(batch, channels, height, width)

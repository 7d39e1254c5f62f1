"""What the formulations share."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


def folded(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return copies of the layers in order, with batch norms folded into the layers before them."""
    result: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            result[-1] = fuse_conv_bn_eval(result[-1], layer)
        elif isinstance(layer, nn.BatchNorm1d):
            result[-1] = fuse_linear_bn_eval(result[-1], layer)
        elif isinstance(layer, nn.ChannelShuffle):
            result.append(Shuffle(layer.groups))
        elif not isinstance(layer, nn.Identity | nn.Dropout):
            result.append(copy.deepcopy(layer))
    return nn.Sequential(*result)


class Shuffle(nn.Module):
    """The channel shuffle as reshapes and a transposition: few exporters have the operator."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = sizes(x)
        x = x.reshape(batch, self.groups, channels // self.groups, height * width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


def sizes(x: Tensor) -> tuple[int, ...]:
    """Return the shape as numbers, which a tracer takes for constants."""
    return tuple(int(size) for size in x.shape)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    """Return a linear layer with `factor` times the outputs."""
    return linear(layer.weight * factor, None if layer.bias is None else layer.bias * factor)


class Gather(nn.Module):
    """Mobile -> Former as two products: the queries (B, T, C), scaled, with the pixels, and back.

    Args:
        query: makes the queries of the tokens (B, T, d).
        heads: of the attention.
    """

    def __init__(self, query: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = scaled(query, (query.out_features // heads) ** -0.5)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        out = torch.softmax(self.logits(x, tokens), -1) @ self._pixels(x).transpose(2, 3)
        return out.transpose(1, 2).reshape(int(x.shape[0]), int(tokens.shape[1]), int(x.shape[1]))

    def logits(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return those of all pixels, (B, heads, T, H * W)."""
        return by_head(self.query(tokens), self.heads) @ self._pixels(x)

    def _pixels(self, x: Tensor) -> Tensor:
        batch, channels, height, width = sizes(x)
        return x.reshape(batch, self.heads, channels // self.heads, height * width)


def by_head(x: Tensor, heads: int) -> Tensor:
    """Return (B, T, C) as (B, heads, T, C / heads)."""
    batch, count, channels = sizes(x)
    return x.reshape(batch, count, heads, channels // heads).transpose(1, 2)

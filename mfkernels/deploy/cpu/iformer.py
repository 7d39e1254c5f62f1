"""iFormer as a plan."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...models.iformer import IFormer
from ...nn import (
    BNLinear,
    ConvBlock,
    ConvBN,
    DropPath,
    FFN2d,
    FusedInvertedBottleneck,
    FusedSequential,
    IFormerBlock,
    IFormerClassifier,
    IFormerStage,
    ReparameterizedDepthwise,
    RepCPE,
    Residual,
    SHMABlock,
    SingleHeadModulationAttention,
)
from ...nn.attention2d import Attention2d, PreNormModulationAttention
from ...nn.layer_norm2d import LayerNorm2d
from .deployed import Deployed
from .packing import Formats, padded
from .plan import Map, Plan
from .pyramid import Wanted, margin_and_reduction
from .steps import Linear

_KNOWN = (
    *(IFormer, BNLinear, ConvBlock, ConvBN, DropPath, FFN2d, FusedInvertedBottleneck, IFormerBlock),
    *(IFormerClassifier, IFormerStage, RepCPE, ReparameterizedDepthwise, Residual, SHMABlock),
    *(Attention2d, LayerNorm2d, PreNormModulationAttention),
    *(SingleHeadModulationAttention, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.GELU, nn.Identity),
    *(nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Sequential, FusedSequential),
)


def deployed_iformer(model: IFormer, formats: Formats, wanted: Wanted | None = None) -> Deployed:
    """Return what `deploy` makes of an `IFormer`, or of these maps of it."""
    Plan(model, formats).check_parts(_KNOWN)
    plan = _Plan(copy.deepcopy(model).double().fuse(), formats)
    return plan.deployed(wanted)


class _Plan(Plan):
    """Of a network that is fused: all convolutions have biases, and there are no batch norms."""

    def __init__(self, model: IFormer, formats: Formats) -> None:
        super().__init__(model, formats)
        self.model = model

    def run(self) -> Deployed:
        model: Any = self.model
        x: Any = None
        for i in range(4):
            x = self.stage(x, i, sums=int(i == 3))
        features = self.place(x.channels)
        with self.named("pool"):
            if len(model.stages[3]) == 0:
                x = self.replaced(x, self.summed(x))
            self.pool(x.channels, features)
        if hasattr(model, "head"):
            with self.named("norm"):
                self.norm(1, model.norm, features, features)
            last = self.pack.row_linear(model.head.weight, model.head.bias)
            return self.finished(
                features, [(last, None)], ["head"], model.in_channels, model.head.out_features
            )
        linears: list[tuple[Linear, str | None]] = []
        if hasattr(model, "proj"):
            linears.append((self.pack.row_linear(model.proj.weight, model.proj.bias), "gelu"))
        last = model.classifier
        linears.append((self.pack.row_linear(last.weight, last.bias), None))
        names = ["proj", "classifier"][-len(linears) :]
        return self.finished(features, linears, names, model.in_channels, last.out_features)

    def pyramid(self, wanted: Wanted) -> Deployed:
        x: Any = None
        for i in range(max(wanted.order) + 1):
            x = self.stage(x, i)
            if i in wanted.order:
                with self.named(f"stages.{i}"):
                    self.hand_out(x)
        return self.finished_pyramid(wanted, self.model.in_channels, self.margins(sorted(wanted.order)))

    def margins(self, stages: list[int]) -> list[int]:
        """Return those of `DeployedPyramid` of these stages' maps."""
        found, size = [], (0, 1)
        for layers in self.model.downsample_layers:
            size = margin_and_reduction([m for m in layers.modules() if isinstance(m, nn.Conv2d)], size)
            found.append(size[0])
        return [found[i] for i in stages]

    def stage(self, x: Map | None, i: int, sums: int = 0) -> Map:
        """Add the i-th stage, and what halves the map before it; `sums` are of its last block."""
        halving: Any = self.model.downsample_layers[i]
        blocks: Any = self.model.stages[i]
        with self.named(f"downsample_layers.{i}"):
            made = self.stem(halving) if x is None else self.halve(x, halving)
        for j, block in enumerate(blocks):
            with self.named(f"stages.{i}.{j}"):
                made = self.block(made, block, sums if j == len(blocks) - 1 else 0)
        return made

    def stem(self, layers: Any) -> Map:
        if isinstance(layers[-1], LayerNorm2d):
            x = self.conv(None, layers[0])
            return self.replaced(x, self.map_norm(x, layers[1]))
        first, _, second = layers
        x = self.conv(None, first, activation="gelu")
        if not isinstance(second, FusedInvertedBottleneck):
            return self.replaced(x, self.conv(x, second))
        hidden = self.replaced(x, self.conv(x, second.conv_exp_bn1, activation="gelu"))
        return self.replaced(hidden, self.point(hidden, second.conv_pwl_bn2))

    def halve(self, x: Map, layers: Any) -> Map:
        if isinstance(layers, nn.Identity):
            return x
        if isinstance(layers[0], LayerNorm2d):
            x = self.replaced(x, self.map_norm(x, layers[0]))
        return self.replaced(x, self.conv(x, layers[-1]))

    def conv(self, x: Map | None, conv: Any, activation: str | None = None) -> Map:
        return self.dense(x, conv, conv.weight, conv.bias, activation)

    def point(self, x: Map, conv: Any, **options: Any) -> Map:
        linear = self.pack.map_linear(conv.weight.flatten(1), conv.bias)
        return self.pointwise(x, conv.out_channels, linear, **options)

    def block(self, x: Map, block: Any, sums: int) -> Map:
        if block.split:
            x = self.replaced(x, self.split(x, block.split))
        inner = block.block
        sums_now = 0 if block.join else sums
        if isinstance(inner, ConvBlock | FFN2d):
            residual = inner.token_channel_mixer if isinstance(inner, ConvBlock) else inner.channel_mixer
            x = self.replaced(x, self.mixed_channels(x, residual, sums_now))
        elif isinstance(inner, RepCPE):
            x = self.replaced(x, self.depth(x, inner.cpe, sums_now))
        else:
            x = self.attend_to_pixels(x, inner.token_channel_mixer, sums_now)
        if block.join:
            x = self.replaced(x, self.join(x, block.join, sums))
        return x

    def depth(self, x: Map, conv: Any, sums: int) -> Map:
        return self.depthwise(x, *self.depthwise_weights(conv, conv.weight, conv.bias), sums=sums)

    def mixed_channels(self, x: Map, residual: Any, sums: int) -> Map:
        *before, expand, _, project = residual.m
        size, taps, bias = 0, 0, 0
        if before:
            conv = before[0]
            self.need(conv.stride == (1, 1), conv, "blocks that keep the size of a map")
            size, taps, bias = self.depthwise_weights(conv, conv.weight, conv.bias)
        linear = self.pack.map_linear(expand.weight.flatten(1), expand.bias)
        projected = self.pack.map_linear(*self.scale(residual, project))
        return self.inverted(x, size, taps, bias, linear, projected, sums)

    def scale(self, residual: Any, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Weight and bias of the last convolution of a residual, with its factor."""
        factor = 1.0 if residual.gamma is None else residual.gamma.flatten()
        weight = conv.weight.flatten(1) * torch.as_tensor(factor).view(-1, 1)
        assert conv.bias is not None
        return weight, conv.bias * factor

    def attend_to_pixels(self, x: Map, residual: Any, sums: int) -> Map:
        mixer = residual.m
        window = getattr(mixer, "window_size", None)
        if window is not None:
            x = self.replaced(x, self.split(x, window))
        inside, linear = self.attended(x, mixer, *self.scale(residual, mixer.proj))
        last = sums if window is None else 0
        out = self.pointwise(inside, x.channels, linear, added=x, sums=last)
        self.free(inside)
        out = self.replaced(x, out)
        return out if window is None else self.replaced(out, self.join(out, window, sums))

    def attended(self, x: Map, mixer: Any, weight: Tensor, bias: Tensor) -> tuple[Map, Linear]:
        """Return the attention's result, and the matrix for it of the weight for its channels.

        Queries, keys, values and gates come from one product.
        """
        heads, gating = getattr(mixer, "num_heads", 1), "sigmoid_gate"
        if isinstance(mixer, Attention2d):
            value: Any = mixer.v_gate
            gating, values = "ungated", [(value.weight, value.bias)]
            scale = (mixer.channels // heads) ** -0.5
        else:
            values = list(zip(mixer.v_gate.weight.chunk(2), mixer.v_gate.bias.chunk(2), strict=True))
        if isinstance(mixer, SingleHeadModulationAttention):
            scale = mixer.scale
        elif isinstance(mixer, PreNormModulationAttention):
            gating, scale = "silu_gate", mixer.q.out_channels**-0.5
        depth, width = mixer.q.out_channels // heads, len(values[0][0]) // heads
        parts = [(mixer.q.weight * scale, mixer.q.bias * scale), (mixer.k.weight, mixer.k.bias), *values]
        weights = torch.cat([by_head(w.flatten(1), heads) for w, _ in parts])
        biases = torch.cat([by_head(b[:, None], heads)[:, 0] for _, b in parts])
        normed = self.map_norm(x, mixer.norm) if hasattr(mixer, "norm") else x
        made = self.pointwise(normed, len(biases), self.pack.map_linear(weights, biases))
        if normed is not x:
            self.free(normed)
        outside = getattr(mixer, "form", "") == "paper"
        out = self.attention(made, width, depth, heads=heads, gating=gating, outside=outside)
        self.free(made)
        return out, self.pack.map_linear(weight if heads == 1 else by_head(weight.t(), heads).t(), bias)


def by_head(rows: Tensor, heads: int) -> Tensor:
    """(heads * n, inputs) with zeros after the rows of each head."""
    each = rows.unflatten(0, (heads, -1))
    return nn.functional.pad(each, (0, 0, 0, padded(each.shape[1]) - each.shape[1])).flatten(0, 1)

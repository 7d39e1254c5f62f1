"""iFormer as a plan."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..models.iformer import IFormer
from ..nn import (
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
from .deployed import Deployed
from .packing import padded
from .plan import Map, Plan
from .pyramid import Wanted
from .steps import Linear

_KNOWN = (
    *(IFormer, BNLinear, ConvBlock, ConvBN, DropPath, FFN2d, FusedInvertedBottleneck, IFormerBlock),
    *(IFormerClassifier, IFormerStage, RepCPE, ReparameterizedDepthwise, Residual, SHMABlock),
    *(SingleHeadModulationAttention, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.GELU, nn.Identity),
    *(nn.Linear, nn.ModuleList, nn.Sequential, FusedSequential),
)


def deployed_iformer(model: IFormer, dtype: torch.dtype, wanted: Wanted | None = None) -> Deployed:
    """What `deploy` makes of an `IFormer`, or of these maps of it."""
    Plan(model, dtype).check_parts(_KNOWN)
    plan = _Plan(copy.deepcopy(model).double().fuse(), dtype)
    return plan.run() if wanted is None else plan.pyramid(wanted)


class _Plan(Plan):
    """Of a network that is fused: all convolutions have biases, and there are no batch norms."""

    def __init__(self, model: IFormer, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.model = model
        self.windows = False

    def run(self) -> Deployed:
        model: Any = self.model
        self.need(len(model.stages[3]) > 0, model, "networks with blocks in their last stage")
        x: Any = None
        for i in range(4):
            x = self.stage(x, i, sums=int(i == 3))
        features = self.place(x.channels)
        with self.named("pool"):
            self.pool(x.channels, features)
        linears: list[tuple[Linear, str | None]] = []
        if hasattr(model, "proj"):
            linears.append((self.pack.linear(model.proj.weight, model.proj.bias), "gelu"))
        last = model.classifier
        linears.append((self.pack.linear(last.weight, last.bias), None))
        names = ["proj", "classifier"][-len(linears) :]
        return self.finished(features, linears, names, model.in_channels, last.out_features)

    def pyramid(self, wanted: Wanted) -> Deployed:
        x: Any = None
        for i in range(max(wanted.order) + 1):
            x = self.stage(x, i)
            if i in wanted.order:
                with self.named(f"stages.{i}"):
                    self.hand_out(x)
        return self.finished_pyramid(wanted, self.model.in_channels)

    def stage(self, x: Map | None, i: int, sums: int = 0) -> Map:
        """The i-th, and what halves the map before it; `sums` of its last block."""
        halving: Any = self.model.downsample_layers[i]
        blocks: Any = self.model.stages[i]
        with self.named(f"downsample_layers.{i}"):
            made = self.stem(halving) if x is None else self.halve(x, halving)
        for j, block in enumerate(blocks):
            with self.named(f"stages.{i}.{j}"):
                made = self.block(made, block, sums if j == len(blocks) - 1 else 0)
        return made

    def stem(self, layers: Any) -> Map:
        first, _, second = layers
        x = self.conv(None, first, activation="gelu")
        if not isinstance(second, FusedInvertedBottleneck):
            return self.replaced(x, self.conv(x, second))
        hidden = self.replaced(x, self.conv(x, second.conv_exp_bn1, activation="gelu"))
        return self.replaced(hidden, self.point(hidden, second.conv_pwl_bn2))

    def halve(self, x: Map, layers: Any) -> Map:
        return x if isinstance(layers, nn.Identity) else self.replaced(x, self.conv(x, layers[0]))

    def conv(self, x: Map | None, conv: Any, activation: str | None = None) -> Map:
        return self.dense(x, conv, conv.weight, conv.bias, activation)

    def point(self, x: Map, conv: Any, **options: Any) -> Map:
        linear = self.pack.linear(conv.weight.flatten(1), conv.bias)
        return self.pointwise(x, conv.out_channels, linear, **options)

    def block(self, x: Map, block: Any, sums: int) -> Map:
        if block.split:
            self.windows, x = True, self.replaced(x, self.split(x, block.split))
        inner = block.block
        sums_now = 0 if block.join else sums
        if isinstance(inner, ConvBlock | FFN2d):
            residual = inner.token_channel_mixer if isinstance(inner, ConvBlock) else inner.channel_mixer
            x = self.replaced(x, self.mixed_channels(x, residual, sums_now))
        elif isinstance(inner, RepCPE):
            x = self.replaced(x, self.depth(x, inner.cpe, sums_now))
        else:
            x = self.modulate(x, inner.token_channel_mixer, sums_now)
        if block.join:
            self.windows, x = False, self.replaced(x, self.join(x, block.join, sums))
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
        linear = self.pack.linear(expand.weight.flatten(1), expand.bias)
        return self.inverted(x, size, taps, bias, linear, self.scaled(residual, project), sums)

    def scaled(self, residual: Any, conv: nn.Conv2d) -> Linear:
        """The last convolution of a residual, with its factor."""
        factor = 1.0 if residual.gamma is None else residual.gamma.flatten()
        weight = conv.weight.flatten(1) * torch.as_tensor(factor).view(-1, 1)
        assert conv.bias is not None
        return self.pack.linear(weight, conv.bias * factor)

    def modulate(self, x: Map, residual: Any, sums: int) -> Map:
        mixer = residual.m
        window = mixer.window_size
        if window is not None:
            self.need(not self.windows, mixer, "windows that are not in others")
            x = self.replaced(x, self.split(x, window))
        inside = self.modulated(x, mixer)
        last = sums if window is None else 0
        out = self.pointwise(inside, x.channels, self.scaled(residual, mixer.proj), added=x, sums=last)
        self.free(inside)
        out = self.replaced(x, out)
        return out if window is None else self.replaced(out, self.join(out, window, sums))

    def modulated(self, x: Map, mixer: Any) -> Map:
        """The attention's result, gated; queries, keys, values and gates come from one product."""
        depth, width = mixer.q.out_channels, mixer.v_gate.out_channels // 2
        value, gate = mixer.v_gate.weight.chunk(2)
        value_bias, gate_bias = mixer.v_gate.bias.chunk(2)
        parts = [(mixer.q.weight * mixer.scale, mixer.q.bias * mixer.scale), (mixer.k.weight, mixer.k.bias)]
        parts += [(value, value_bias), (gate, gate_bias)]

        def rows(values: Tensor) -> Tensor:
            missing = padded(len(values)) - len(values)
            return torch.cat([values.flatten(1), values.new_zeros(missing, values[0].numel())])

        weight = torch.cat([rows(w) for w, _ in parts])
        bias = torch.cat([rows(b[:, None])[:, 0] for _, b in parts])
        made = self.pointwise(x, len(bias), self.pack.linear(weight, bias))
        out = self.attention(made, width, depth, mixer.form == "paper")
        self.free(made)
        return out

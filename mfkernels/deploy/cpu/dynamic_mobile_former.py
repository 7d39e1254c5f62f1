"""Dynamic Mobile-Former as a plan."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...models.dynamic_mobile_former import DynamicMobileFormer
from ...nn import (
    DMFBlock,
    DMFFormer,
    DMFHead,
    DMFMobileToFormer,
    DMFStem,
    DropPath,
    DynamicMobile,
    DynamicResidualConv2d,
    FusedSequential,
    GlobalResponseNorm,
    InvertedBottleneck,
    InvertedResidualFFN,
    KernelAttention,
)
from ...nn.conv_bn import affine
from ...nn.dmf_tokens import _MLP, _TokenAttention
from .deployed import Deployed
from .packing import Formats, fold, padded, padded_rows, padded_slots, taps
from .plan import MOST_DEPTHWISE, MOST_PAIRS, Bridges, Map, Plan
from .pyramid import Wanted
from .steps import Linear

_KNOWN = (
    *(DynamicMobileFormer, DMFBlock, DMFFormer, DMFHead, DMFMobileToFormer, DMFStem, DropPath, DynamicMobile),
    *(DynamicResidualConv2d, GlobalResponseNorm, InvertedBottleneck, InvertedResidualFFN, KernelAttention),
    *(_MLP, _TokenAttention, nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.GELU, nn.GroupNorm, nn.LayerNorm),
    *(nn.Linear, nn.ModuleList, nn.ReLU, nn.Sequential, FusedSequential),
)


def deployed_dynamic_mobile_former(
    model: DynamicMobileFormer, formats: Formats, wanted: Wanted | None = None
) -> Deployed:
    """Return what `deploy` makes of a `DynamicMobileFormer`, or of these maps of it."""
    plan = _Plan(model, formats, wanted)
    return plan.deployed(wanted)


class _Plan(Plan):
    def __init__(self, model: DynamicMobileFormer, formats: Formats, wanted: Wanted | None) -> None:
        super().__init__(model, formats)
        self.check_parts(_KNOWN)
        self.model = model
        self.blocks: list[Any] = list(model.blocks)
        if wanted is not None:
            last = wanted.stages[-1].name
            self.blocks = self.blocks[: [f"blocks.{i}" for i in range(len(self.blocks))].index(last) + 1]
        _, self.count, self.dim = model.tokens.shape
        self.at = self.place(self.count * padded(self.dim))
        # What the head takes: the map's means, and the first token, which also drives the convolutions.
        features = model.channel_conv.static_weight.shape[0] if wanted is None else 0
        self.features = self.place(padded(features) + padded(self.dim))
        self.token = self.features + padded(features)
        # The bridge after each block, the first before all; none after the last map of a pyramid.
        self.bridges = [block.mobile2former for block in self.blocks]
        self.queries = self.place(self.count * max(padded(bridge.channels) for bridge in self.bridges))
        self.bridges.append(model.end_mobile2former if wanted is None else None)
        kernels = (len(m.net2.weight) for m in model.modules() if isinstance(m, KernelAttention))
        self.attention_at = self.place(max(kernels, default=1))

    def run(self) -> Deployed:
        model: Any = self.model
        *_, (_, x) = self.block_maps()
        with self.named("end_former"):
            self.token_step(model.end_mobile2former, model.end_former, None)
        with self.named("channel_conv"):
            x = self.replaced(x, self.convolve(x, model.channel_conv, model.bn, activation="gelu", sums=1))
            self.pool(x.channels, self.features)
        first, last = model.head.fc1, model.head.fc2
        pooled, token = first.weight.split([x.channels, self.dim], 1)
        weight = torch.cat([padded_rows(pooled), padded_rows(token)], 1)
        linears: list[tuple[Linear, str | None]] = [
            (self.pack.row_linear(weight, first.bias), "hardswish"),
            (self.pack.row_linear(padded_rows(last.weight), last.bias), None),
        ]
        names = ["head.fc1", "head.fc2"]
        return self.finished(self.features, linears, names, model.in_channels, last.out_features)

    def pyramid(self, wanted: Wanted) -> Deployed:
        names = [stage.name for stage in wanted.stages]
        for name, x in self.block_maps():
            if name in names:
                with self.named(name):
                    self.hand_out(x)
        return self.finished_pyramid(wanted, self.model.in_channels)

    def block_maps(self) -> Iterator[tuple[str, Map]]:
        """Each block's name and its map, when its steps have been written."""
        model: Any = self.model
        blocks, bridges = self.blocks, self.bridges
        with self.named("tokens"):
            self.token_step(None, None, bridges[0])
        with self.named("stem"):
            weight, bias = fold(model.stem.conv, model.stem.bn)
            x = self.dense(None, model.stem.conv, weight, bias, "gelu")
        with self.named("lite_bottleneck"):
            x = self.lite(x, model.lite_bottleneck, bridges[0], pooled=not self.halves(blocks[0]))
        for i, block in enumerate(blocks):
            with self.named(f"blocks.{i} tokens"):
                self.token_step(block.mobile2former, block.former, bridges[i + 1])
            with self.named(f"blocks.{i}"):
                pooled = i + 1 == len(blocks) or not self.halves(blocks[i + 1])
                x = self.block(x, block, bridges[i + 1], pooled)
            yield f"blocks.{i}", x

    def halves(self, block: DMFBlock) -> bool:
        return hasattr(block.dynamic_mobile, "downsample")

    def bridge(self, bridge: DMFMobileToFormer | None) -> Bridges | None:
        if bridge is None:
            return None
        heads, row = bridge.num_heads, padded(bridge.channels)
        self.need(heads * self.count <= MOST_PAIRS, bridge, f"at most {MOST_PAIRS} pairs of heads and tokens")
        return Bridges(heads, self.count, row, gather=self.queries)

    # --- tokens ------------------------------------------------------------------------------------------

    def token_step(self, bridge: Any, former: Any, following: Any) -> None:
        """Add what `bridge` and `former` do to the tokens, and the queries of the next bridge."""
        linear, count, width = self.pack.row_linear, self.count, padded(self.dim)
        if bridge is None:
            self.copy_weights(padded_rows(self.model.tokens[0]), self.at)
        else:
            with self.places(count * padded(bridge.channels)) as (made,):
                self.combine(count, bridge.channels, bridge.num_heads, made)
                self.linear(count, made, linear(bridge.fc.weight), self.at, added=True)
        if former is not None:
            self.former(former)
            self.copy(self.at, width, self.token)
        if following is not None:
            scale = (following.channels // following.num_heads) ** -0.5
            self.norm(count, following.norm, self.at, self.at)
            self.linear(count, self.at, linear(following.q.weight, factor=scale), self.queries)

    def former(self, former: DMFFormer) -> None:
        attention, mlp, count, width = former.token_attention, former.mlp, self.count, padded(self.dim)
        linear, heads = self.pack.row_linear, attention.num_heads
        hidden = padded(mlp.fc1.out_features)
        with self.places(*(n * count * width for n in (1, 3, 1)), count * hidden) as places:
            normed, qkv, mixed, inner = places
            self.norm(count, former.norm1, self.at, normed)
            weight = torch.cat([padded_rows(w.t()).t() for w in attention.qkv.weight.chunk(3)])
            self.linear(count, normed, linear(weight), qkv)
            self.attend(count, heads, self.dim, (qkv, qkv + width, qkv + 2 * width), 3 * width, mixed)
            project = linear(attention.proj.weight, attention.proj.bias)
            self.linear(count, mixed, project, self.at, added=True)
            self.norm(count, former.norm2, self.at, normed)
            self.linear(count, normed, linear(mlp.fc1.weight), inner, activation="gelu")
            self.linear(count, inner, linear(mlp.fc2.weight), self.at, added=True)

    # --- maps --------------------------------------------------------------------------------------------

    def lite(self, x: Map, lite: Any, bridge: Any, pooled: bool) -> Map:
        x = self.replaced(x, self.static(x, lite.pw_conv1, lite.bn1, activation="gelu"))
        x = self.replaced(x, self.static(x, lite.dw_conv, lite.bn2, activation="gelu"))
        return self.replaced(
            x, self.static(x, lite.pw_conv2, lite.bn3, bridges=self.bridge(bridge), sums=int(pooled))
        )

    def block(self, x: Map, block: Any, bridge: Any, pooled: bool) -> Map:
        mobile = block.dynamic_mobile
        if self.halves(block):
            halve, norm, _ = mobile.downsample
            x = self.replaced(x, self.static(x, halve, norm, activation="gelu", sums=1))
        x = self.replaced(x, self.convolve(x, mobile.pw_conv1, mobile.bn1, activation="gelu", sums=1))
        x = self.replaced(x, self.convolve(x, mobile.dw_conv, mobile.bn2, activation="gelu", sums=1))
        x = self.replaced(x, self.convolve(x, mobile.pw_conv2, mobile.bn3, sums=2))
        ffn, norm = block.ffn, block.norm
        self.need(norm.num_groups == 1, norm, "group norms of one group")
        normed = self.affine("group_norm", norm.weight, norm.bias, norm.eps)
        hidden = self.static(x, ffn.pw_conv1, ffn.bn1, activation="gelu", affine=normed)
        hidden = self.replaced(hidden, self.shortcut(hidden, ffn.dw_conv))
        grn = ffn.grn
        form = "response_norm" if grn.mean == "released" else "response_norm_of_channels"
        response = self.affine(form, grn.gamma, grn.beta, grn.eps)
        out = self.static(
            *(hidden, ffn.pw_conv2, ffn.bn3),
            affine=response,
            affine_gelu=True,
            added=x,
            sums=int(pooled),
            bridges=self.bridge(bridge),
        )
        self.free(hidden)
        return self.replaced(x, out)

    def static(self, x: Map, conv: nn.Conv2d, norm: nn.BatchNorm2d, **options: Any) -> Map:
        """Add a convolution of one kernel, and its batch norm."""
        weight, bias = fold(conv, norm)
        if conv.kernel_size == (1, 1):
            (stride, across), fits = conv.stride, conv.padding == (0, 0)
            self.need(fits and stride == across <= MOST_DEPTHWISE, conv, "1x1 convolutions without padding")
            linear = self.pack.map_linear(weight.flatten(1), bias, groups=conv.groups)
            return self.point(x, conv.out_channels, linear, stride, groups=conv.groups, **options)
        places = self.depthwise_weights(conv, weight, bias)
        return self.depthwise(x, *places, stride=conv.stride[0], **options)

    def shortcut(self, x: Map, conv: nn.Conv2d) -> Map:
        """Add a depthwise convolution whose result has its input added to it."""
        weight = conv.weight.detach().double().clone()
        size = conv.kernel_size[0]
        weight[:, :, size // 2, size // 2] += 1
        places = self.depthwise_weights(conv, weight, torch.zeros(conv.out_channels))
        return self.depthwise(x, *places, sums=2)

    def convolve(self, x: Map, conv: Any, norm: nn.BatchNorm2d, **options: Any) -> Map:
        """Add a convolution of a block, dynamic or not, and its batch norm.

        The last step left the sums of x.
        """
        if isinstance(conv, nn.Conv2d):
            return self.static(x, conv, norm, **options)
        kernels = self.kernel_weights(conv.Kernel_Attention)
        scale, shift = affine(norm)
        outputs, _, size, _ = conv.static_weight.shape
        depthwise = conv.groups > 1 and conv.groups == outputs == x.channels
        order: Callable[[Tensor], Tensor]
        if depthwise:
            fits = size % 2 == 1 and size <= MOST_DEPTHWISE
            self.need(fits, conv, "depthwise convolutions of odd squares")
            order = lambda w: taps(w, padded_slots(outputs))  # noqa: E731
        else:
            self.need(size == 1, conv, "pointwise or depthwise dynamic convolutions")
            order = lambda w: self.pack.matrix(w.flatten(1), groups=conv.groups)  # noqa: E731
        what = f"convolutions padded by half of them, of strides up to {MOST_DEPTHWISE}"
        self.need(conv.padding == size // 2 and conv.stride <= MOST_DEPTHWISE, conv, what)
        folded = [w.detach().double() * scale.view(-1, 1, 1, 1) for w in (conv.static_weight, *conv.weight)]
        values = [order(folded[0]), *(order(0.1 * w) for w in folded[1:])]
        place = self.mix(self.attention_at, kernels, values, not depthwise)
        bias = self.pack.add(padded_rows(shift))
        if depthwise:
            return self.depthwise(x, size, place, bias, stride=conv.stride, mixed=True, **options)
        linear = Linear(x.channels, padded(outputs), place, bias)
        return self.point(x, outputs, linear, conv.stride, groups=conv.groups, mixed=True, **options)

    def point(self, x: Map, outputs: int, linear: Linear, stride: int, **options: Any) -> Map:
        """Add a 1x1 convolution of any stride: of a copy of the pixels that it reads."""
        if stride == 1:
            return self.pointwise(x, outputs, linear, **options)
        read = self.every(stride, x)
        return self.replaced(read, self.pointwise(read, outputs, linear, **options))

    def every(self, stride: int, x: Map) -> Map:
        """Copy the pixels that a convolution of this stride reads, by a depthwise one."""
        weight = torch.zeros(x.channels, 1, 3, 3)
        weight[:, :, 1, 1] = 1
        offset = self.pack.depthwise(weight, torch.zeros(x.channels), padded_slots(x.channels))
        return self.depthwise(x, 3, offset, offset + 9 * padded(x.channels), stride=stride)

    def kernel_weights(self, attention: KernelAttention) -> int:
        """Return the weights of a dynamic convolution's kernels; how many there are."""
        first, last = attention.net1.weight.flatten(1), attention.net2.weight.flatten(1)
        scale, shift = affine(attention.bn)
        token, means = first.split([self.dim, attention.channels], 1)
        hidden = self.pack.row_linear(torch.cat([padded_rows(token), padded_rows(means)], 1), shift, scale)
        scores = self.pack.row_linear(last, factor=1 / attention.temperature)
        softmax = int(attention.activation == "softmax")
        fields = (hidden, scores, softmax, len(last), self.attention_at)
        self.kernels(self.token, self.dim, attention.channels, *fields)
        return len(last)

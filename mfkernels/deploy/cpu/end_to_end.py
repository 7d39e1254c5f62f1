"""The end-to-end detector as a plan."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...models.end_to_end import Detections, EndToEndMobileFormer
from ...nn import DetectionBlock, DynamicReLU, FormerToMobile, HyperNetwork, MobileToFormer, UpConv
from ...nn.adapt_position import AdaptPosition
from ...nn.drop_path import DropPath
from ...nn.encoder_layer import EncoderLayer
from .iformer import by_head
from .mobile_former import MobileFormerPlan, Outputs
from .mobile_former_blocks import Activated
from .packing import dense, fold, padded, padded_rows, padded_slots, spread
from .plan import MOST_PAIRS, Bridges, Map
from .pyramid import DeployedMaps, Result, Run, Wanted
from .steps import Linear

_KNOWN = (
    *(EndToEndMobileFormer, AdaptPosition, DetectionBlock, DropPath, DynamicReLU, EncoderLayer),
    *(FormerToMobile, HyperNetwork, MobileToFormer, UpConv, nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.GELU),
    *(nn.Hardsigmoid, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.MultiheadAttention, nn.ReLU),
    *(nn.Sequential, nn.Sigmoid),
)


class DeployedEndToEnd(DeployedMaps):
    """The end-to-end detector prepared for inference on a CPU.

    Args:
        results, weights, plan, **options: of `DeployedMaps`.
    """

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Detections:  # type: ignore[override]
        """Run (B, 3, H, W) images on the CPU and return `Detections` of the last block, in their dtype.

        Those of the blocks before it are not computed: `auxiliary` is empty.

        Raises:
            TypeError, ValueError: an input that does not fit, named; a mask: all images of a batch have one
                size.
        """
        if mask is not None:
            raise ValueError(
                "deploy: mask must be None: images of a deployed detector have no padding; run images of "
                "several sizes one by one, or the network that it was made of"
            )
        logits, boxes = (rows[..., 0].transpose(1, 2) for rows in super().forward(images))
        # PyTorch's sigmoid has other last bits of other strides.
        return Detections(logits, boxes.contiguous().sigmoid())


def deployed_end_to_end(model: EndToEndMobileFormer, run: Run) -> DeployedEndToEnd:
    """Return what `deploy` makes of an `EndToEndMobileFormer`."""
    backbone, count = model.backbone, len(model.scales)
    finest = len(backbone.feature_info) - count

    def make(plan: MobileFormerPlan, maps: list[Map]) -> DeployedEndToEnd:
        return _Head(plan, model).run(maps[::-1])

    return run(backbone, Wanted(backbone, range(finest, finest + count), make))


class _Head:
    """Adds the steps of the head to a plan of the backbone, whose tokens it takes the place of."""

    def __init__(self, plan: MobileFormerPlan, model: EndToEndMobileFormer) -> None:
        self.plan, self.model = plan, model
        self.queries, channels = model.content.shape
        plan.names |= {module: name for name, module in model.named_modules()}
        backbone = set(model.backbone.modules())
        plan.check_parts(_KNOWN, (module for module in model.modules() if module not in backbone))
        self.width = padded(channels)
        plan.tokens, plan.width = self.queries, channels
        plan.at = plan.place(self.queries * self.width)
        self.position = plan.place(self.queries * self.width)

    def run(self, coarsest_first: list[Map]) -> DeployedEndToEnd:
        plan, model = self.plan, self.model
        with plan.named("queries"):
            plan.copy_weights(padded_rows(model.content), plan.at)
            plan.copy_weights(padded_rows(model.position), self.position)
        with plan.named("projection"):
            x = self.point(coarsest_first[0], model.projection)
            plan.release(coarsest_first[0])
        for i, blocks in enumerate(model.scales):
            if i > 0:
                with plan.named(f"up_convs.{i - 1}"):
                    x = self.up(x, model.up_convs[i - 1], coarsest_first[i])
            for j, block in enumerate(cast(nn.ModuleList, blocks)):
                x = self.block(f"scales.{i}.{j}", x, block)
        plan.free(x)
        with plan.named("classify"):
            logits = self.predicted(model.classify)
        with plan.named("locate"):
            boxes = self.predicted(*list(model.locate)[:-1])
        results = [logits, boxes]
        return plan.finished_maps(DeployedEndToEnd, model.backbone.in_channels, results)

    # --- maps --------------------------------------------------------------------------------------------

    def point(self, x: Map, conv: Any) -> Map:
        return self.plan.pointwise(
            x, conv.out_channels, self.plan.pack.linear(conv.weight.flatten(1), conv.bias)
        )

    def up(self, x: Map, up: Any, finer: Map) -> Map:
        plan = self.plan
        lateral = self.point(finer, up.lateral)
        plan.release(finer)
        x = plan.replaced(x, plan.resize(x, lateral, "bilinear_by_two", added=lateral))
        plan.free(lateral)
        (conv, norm), (point, point_norm) = up.conv1, up.conv2
        taps = plan.depthwise_weights(conv, *fold(conv, norm))
        x = plan.replaced(x, plan.depthwise(x, *taps))
        weight, bias = fold(point, point_norm)
        return plan.replaced(x, plan.pointwise(x, x.channels, plan.pack.linear(weight.flatten(1), bias)))

    def encoded(self, x: Map, layer: Any) -> Map:
        """Add an encoder layer over the pixels."""
        plan, attention = self.plan, layer.attention
        heads, depth = attention.num_heads, x.channels // attention.num_heads
        (query, *weights), (query_bias, *biases) = _projections(attention)
        weights, biases = (
            [query * depth**-0.5, *weights],
            [query_bias * depth**-0.5, *biases],
        )
        columns = torch.cat([by_head(weight, heads) for weight in weights])
        bias = torch.cat([by_head(one[:, None], heads)[:, 0] for one in biases])
        made = plan.pointwise(x, len(columns), plan.pack.linear(columns, bias))
        seen = plan.replaced(made, plan.attention(made, depth, depth, heads=heads, gating="ungated"))
        last = attention.out_proj
        weight = last.weight if heads == 1 else by_head(last.weight.t(), heads).t()
        linear = plan.pack.linear(weight, last.bias)
        x = plan.replaced(x, plan.replaced(seen, plan.pointwise(seen, x.channels, linear, added=x)))
        x = plan.replaced(x, plan.map_norm(x, layer.layer_norm))
        expand, _, project = layer.ffn
        first, second = (plan.pack.linear(one.weight, one.bias) for one in (expand, project))
        x = plan.replaced(x, plan.inverted(x, 0, 0, 0, first, second))
        return plan.replaced(x, plan.map_norm(x, layer.ffn_norm))

    def block(self, name: str, x: Map, block: Any) -> Map:
        plan = self.plan
        plan.need(block.mobile_first, block, "blocks whose Mobile comes first")
        if block.pixel_block is not None:
            with plan.named(f"{name} pixels"):
                x = self.encoded(x, block.pixel_block)
        (conv, norm), (point, point_norm) = block.conv1, block.conv2
        times = conv.out_channels // conv.in_channels
        order = [i * times + j for j in range(times) for i in range(conv.in_channels)]  # of memory
        slots = padded_slots(conv.in_channels, order)
        with ExitStack() as places:
            with plan.named(f"{name} tokens"):
                if block.adapt_position is not None:
                    self.adapt(block.adapt_position)
                (slopes,) = plan.generated([Activated(block.act, block.hyper, slots)], places)
                bridges = self.bridges(block, places)
            with plan.named(name):
                fits = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == (1, 1)
                plan.need(fits, conv, "depthwise convolutions of 3x3 and stride 1")
                taps = plan.pack.depthwise(*fold(conv, norm), slots)
                weight, bias = fold(point, point_norm)
                matrix = spread(dense(weight, 1).t(), order).t()
                project = plan.pack.linear(matrix, bias, runs=times)
                out = plan.dynamic_lite(x, len(slots), taps, slopes.place, project, bridges)
                x = plan.replaced(x, out)
            with plan.named(f"{name} tokens"):
                plan.from_mobile(block.local_global, x)
        with plan.named(f"{name} tokens"):
            self.encode_queries(block.global_block)
        return x

    # --- queries -----------------------------------------------------------------------------------------

    def adapt(self, layers: Any) -> None:
        plan, (first, _, last) = self.plan, layers.g
        hidden = plan.pack.row_linear(first.weight, first.bias)
        with plan.places(self.queries * hidden.outputs) as (place,):
            plan.linear(self.queries, plan.at, hidden, place, activation="relu")
            linear = plan.pack.row_linear(padded_rows(last.weight), last.bias)
            plan.linear(self.queries, place, linear, self.position, added=True)

    def bridges(self, block: Any, places: Any) -> Bridges:
        """Add what the queries give to both bridges: keys, values, and their own queries and gates."""
        plan, back, bridge = self.plan, block.global_local, block.local_global
        for part, name in ((back, "k"), (bridge, "q")):
            plan.need(hasattr(part, name) and not hasattr(part, "mlp"), part, "mixing by attention")
        heads, channels = bridge.num_heads, bridge.channels
        plain = not hasattr(back, "alpha") and not hasattr(back, "q") and back.num_heads == heads
        plan.need(plain and not hasattr(bridge, "k"), block, "bridges without projections, of as many heads")
        fits = heads * self.queries <= MOST_PAIRS
        plan.need(fits, block, f"at most {MOST_PAIRS} pairs of heads and queries")
        every, scale = range(channels), (channels // heads) ** -0.5
        asking = Outputs(bridge.q, every, scale)
        made = [Outputs(back.k, every, scale), Outputs(back.proj, every), asking]
        if hasattr(bridge, "alpha"):
            made.append(Outputs(bridge.alpha[0], every))
        linear = plan.side_by_side(made)
        row, columns = linear.outputs, padded(channels)
        (place,) = places.enter_context(plan.places(self.queries * row))
        plan.linear(self.queries, plan.at, linear, place)
        # Positions are of the bridge's queries alone.
        positions = plan.side_by_side([_without_bias(asking.layer.weight, scale)])
        plan.linear(self.queries, self.position, positions, place + 2 * columns, added=True, stride=row)
        plan.gates, plan.row = place + 3 * columns, row
        return Bridges(heads, self.queries, row, scatter=place, gather=place + 2 * columns)

    def encode_queries(self, layer: Any) -> None:
        """Add an encoder layer over the queries; positions are in its queries and keys."""
        plan, count, width, attention = self.plan, self.queries, self.width, layer.attention
        weights, biases = _projections(attention)
        every = range(plan.width)
        layers = [
            Outputs(SimpleNamespace(weight=weight, bias=bias), every)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        with plan.places(count * 3 * width, count * width) as (made, seen):
            plan.linear(count, plan.at, plan.side_by_side(layers), made)
            positions = plan.side_by_side([_without_bias(weight) for weight in weights[:2]])
            plan.linear(count, self.position, positions, made, added=True, stride=3 * width)
            places = made, made + width, made + 2 * width
            plan.attend(count, attention.num_heads, plan.width, places, 3 * width, seen)
            last = attention.out_proj
            plan.linear(count, seen, plan.pack.row_linear(last.weight, last.bias), plan.at, added=True)
        plan.norm(count, layer.layer_norm, plan.at, plan.at)
        plan.feed_forward(layer.ffn, layer.ffn_norm)

    def predicted(self, *layers: Any) -> Result:
        """Add linear layers of the queries, with ReLUs between them, and hand out what they give."""
        plan, source = self.plan, self.plan.at
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linears):
            linear: Linear = plan.pack.row_linear(padded_rows(layer.weight), layer.bias)
            target = plan.place(self.queries * linear.outputs)
            last = i == len(linears) - 1
            plan.linear(self.queries, source, linear, target, activation=None if last else "relu")
            source = target
        rows = plan.state_rows(source, self.queries, linears[-1].out_features)
        plan.hand_out(rows)
        plan.free(rows)
        return Result(rows.channels, -self.queries)


def _projections(attention: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the weights and the biases of queries, keys and values."""
    return attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)


def _without_bias(weight: Tensor, factor: float = 1.0) -> Outputs:
    layer = SimpleNamespace(weight=weight, bias=torch.zeros(len(weight)))
    return Outputs(layer, range(len(weight)), factor)

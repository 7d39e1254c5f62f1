"""Mobile-Former as a plan."""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.mobile_former import MobileFormer
from ..nn import (
    ClassifierHead,
    DropPath,
    DynamicReLU,
    Former,
    FormerToMobile,
    FusedSequential,
    HyperNetwork,
    LiteBottleneck,
    MobileFormerBlock,
    MobileFormerDownsample,
    MobileToFormer,
)
from ..nn.conv_bn import affine
from . import steps
from .deployed import Deployed
from .packing import dense, fold, padded, padded_rows, padded_slots, shuffled, spread
from .plan import MOST_PAIRS, Bridges, Map, Plan
from .pyramid import Wanted
from .steps import Linear

_BLOCKS = (LiteBottleneck, MobileFormerBlock, MobileFormerDownsample)
_KNOWN = (
    *_BLOCKS,
    *(
        MobileFormer,
        ClassifierHead,
        DropPath,
        DynamicReLU,
        Former,
        FormerToMobile,
        HyperNetwork,
        MobileToFormer,
    ),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.ChannelShuffle, nn.Conv2d, nn.Dropout, nn.Embedding, nn.GELU),
    *(
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.ReLU,
        nn.ReLU6,
        nn.Sequential,
        FusedSequential,
    ),
)


def deployed_mobile_former(model: MobileFormer, dtype: torch.dtype, wanted: Wanted | None = None) -> Deployed:
    """What `deploy` makes of a `MobileFormer`, or of these maps of it."""
    plan = _Plan(model, dtype)
    return plan.run() if wanted is None else plan.pyramid(wanted)


class _Made(NamedTuple):
    """What the tokens make for a pass: its map's bridges, and where its dynamic ReLUs' slopes are."""

    bridges: Bridges | None
    slopes: list[int]


class _Plan(Plan):
    def __init__(self, model: MobileFormer, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.check_parts(_KNOWN)
        self.model = model
        self.tokens, self.width = model.tokens.weight.shape
        self.at = self.place(self.tokens * padded(self.width))
        self.gates = self.row = 0  # of the last map's bridge, where it has any

    def run(self) -> Deployed:
        model = self.model
        x = self.passes(
            {f"features.{i}": block for i, block in enumerate(model.features)}, model.local_global
        )
        with self.named("local_global"):
            self.from_mobile(model.local_global)
        features, linears = self.head(x, model.classifier)
        names = ["classifier.fc", "classifier.classifier"]
        last: Any = model.classifier.classifier[1]
        return self.finished(features, linears, names, model.in_channels, last.out_features)

    def pyramid(self, wanted: Wanted) -> Deployed:
        names = [stage.name for stage in wanted.stages]
        blocks = {f"features.{i}": block for i, block in enumerate(self.model.features)}
        last = list(blocks).index(names[-1])
        self.passes(dict(list(blocks.items())[: last + 1]), None, names)
        return self.finished_pyramid(wanted, self.model.in_channels)

    # --- passes ------------------------------------------------------------------------------------------

    def passes(self, blocks: dict[str, Any], last: Any, handed_out: Any = ()) -> Map:
        """The stem and these blocks, the map after which is read by the bridge `last`."""
        for block in blocks.values():
            if type(block) not in _BLOCKS:
                raise self.refuse(block, "unknown to deploy")
        each: list[tuple[str, Any]] = [("stem", None), *blocks.items()]
        self.part = "stem tokens"
        self.copy_weights(padded_rows(self.model.tokens.weight), self.at)
        x: Any = None
        before = ExitStack()
        for i, (name, block) in enumerate(each):
            following = each[i + 1][1] if i + 1 < len(each) else None
            bridge = last if following is None else getattr(following, "local_global", None)
            places = ExitStack()
            with self.named(f"{name} tokens"):
                made = self.token_step(block, bridge, places)
            before.close()  # not sooner: its gates are read by this step
            before = places
            with self.named(name):
                x = self.one_pass(x, block, made)
                if name in handed_out:
                    self.hand_out(x)
        return x

    def one_pass(self, x: Any, block: Any, made: _Made) -> Map:
        """The map of `block`, None for the stem."""
        if block is None:
            return self.stem(made.bridges)
        if isinstance(block, LiteBottleneck):
            return self.replaced(x, self.lite_block(x, block, made))
        if isinstance(block, MobileFormerBlock):
            return self.replaced(x, self.former_block(x, block, made))
        return self.replaced(x, self.downsample(x, block, made))

    def stem(self, bridges: Bridges | None) -> Map:
        stem: Any = self.model.stem
        conv, norm, _ = stem
        return self.dense(None, conv, *fold(conv, norm), "relu6", bridges)

    def lite_block(self, x: Map, block: Any, made: _Made) -> Map:
        self.need(len(block.conv) == 6, block, "3x3 depthwise convolutions")
        conv, norm, _, shuffle, point, point_norm = block.conv
        taps, hidden, order = self.multiplying(block, conv, norm, shuffle)
        linear = self.folded(point, point_norm, order, nn.Identity(), len(order) // conv.in_channels)
        out = self.out(point.out_channels, 0, made.bridges)
        stride, residual = conv.stride[0], int(block.skip)
        return self.made("lite", steps.Lite(out, *x, stride, residual, hidden, taps, linear))

    def former_block(self, x: Map, block: Any, made: _Made) -> Map:
        self.need(not block.before_skip, block, "blocks with the residual before the bridge")
        point1, norm1, shuffle1 = block.conv1
        conv, norm = block.conv2
        point2, norm2, shuffle2 = block.conv3
        self.check_depthwise(block, conv)
        self.need(conv.stride == (1, 1), block, "blocks with stride 1")
        channels = conv.out_channels
        expand = self.folded(point1, norm1, range(point1.in_channels), shuffle1)
        taps = self.pack.depthwise(*fold(conv, norm), padded_slots(channels))
        project = self.folded(point2, norm2, range(channels), shuffle2)
        out, residual, hidden = (
            self.out(point2.out_channels, 0, made.bridges),
            int(block.skip),
            padded(channels),
        )
        first, last = made.slopes
        return self.made("block", steps.Block(out, *x, residual, hidden, taps, first, last, expand, project))

    def downsample(self, x: Map, block: Any, made: _Made) -> Map:
        self.need(not block.skip, block, "downsample blocks without an outer residual")
        self.need(len(block.conv1) == 3 and len(block.conv3) == 3, block, "3x3 depthwise convolutions")
        conv1, norm1, shuffle1 = block.conv1
        conv3, norm3, shuffle3 = block.conv3
        point1, point2 = block.conv2, block.conv4
        taps1, hidden1, order = self.multiplying(block, conv1, norm1, shuffle1)
        project1 = self.folded(point1[0], point1[1], order, nn.Identity(), len(order) // conv1.in_channels)
        taps2, hidden2, order = self.multiplying(block, conv3, norm3, shuffle3)
        project2 = self.folded(point2[0], point2[1], order, nn.Identity(), len(order) // conv3.in_channels)
        self.need(conv3.stride == (1, 1), block, "a second depthwise convolution of stride 1")
        out, (slopes1, slopes2) = self.out(conv3.in_channels, 0, made.bridges), made.slopes
        return self.made(
            "down",
            steps.Down(
                *(out, *x, conv1.stride[0]),
                *(hidden1, taps1, slopes1),
                *(hidden2, taps2, slopes2),
                *(project1, project2),
            ),
        )

    def check_block(self, block: Any) -> None:
        second = block.act2 if isinstance(block, MobileFormerBlock) else block.act3
        last = block.act3 if isinstance(block, MobileFormerBlock) else block.act4
        for act in (block.act1, second):
            self.need(act.num_functions == 2, act, "dynamic ReLUs of two functions")
        self.need(last.num_functions == -1, last, "blocks without squeeze-and-excitation")
        self.need(block.token_id >= 0, block, "dynamic ReLUs with the coefficients of one token")

    def check_depthwise(self, block: nn.Module, conv: Any) -> None:
        fits = isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.groups == conv.in_channels
        self.need(
            fits and conv.stride in ((1, 1), (2, 2)), block, "3x3 depthwise convolutions of stride 1 or 2"
        )

    def multiplying(
        self, block: nn.Module, conv: nn.Conv2d, norm: nn.BatchNorm2d, shuffle: nn.Module
    ) -> tuple[int, int, list[int]]:
        """A depthwise convolution that makes several channels of each: its offset, its padded channels, and
        the numbers, after the shuffle, of its outputs in the order of memory."""
        self.check_depthwise(block, conv)
        inputs, times = conv.in_channels, conv.out_channels // conv.in_channels
        offset = self.pack.depthwise(*fold(conv, norm), padded_slots(inputs, _made(conv)))
        return offset, times * padded(inputs), _numbers(conv, shuffle)

    def folded(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d, columns: Any, shuffle: nn.Module, runs: int = 1
    ) -> Linear:
        """A 1x1 convolution; its inputs lie in memory in the order of `columns`, in so many runs;
        its outputs are shuffled."""
        weight, bias = fold(conv, norm)
        rows = shuffled(shuffle, conv.out_channels)
        matrix = dense(weight, conv.groups)[rows][:, list(columns)]
        return self.pack.linear(matrix, bias[rows], runs=runs)

    # --- tokens ------------------------------------------------------------------------------------------

    def token_step(self, block: Any, bridge: Any, places: ExitStack) -> _Made:
        """What `block` does to the tokens, and what these make for it and for the bridge that reads its map;
        in `places`."""
        made: list[tuple[nn.Linear, float]] = []
        slopes: list[int] = []
        heads = 0
        if block is not None and not isinstance(block, LiteBottleneck):
            self.check_block(block)
            self.from_mobile(block.local_global)
            self.former(block.global_block)
            slopes = self.hypers(block, places)
            scatter = block.global_local
            self.check_scatter(scatter)
            heads = scatter.num_heads
            made += [(scatter.k, (scatter.channels // heads) ** -0.5), (scatter.proj, 1.0)]
        if bridge is not None:
            self.check_bridge(bridge)
            self.need(heads in (0, bridge.num_heads), bridge, "the heads of the Mobile <- Former before it")
            heads = bridge.num_heads
            made += [(bridge.q, (bridge.channels // heads) ** -0.5)]
            if hasattr(bridge, "alpha"):
                made += [(bridge.alpha[0], 1.0)]
        if not made:
            return _Made(None, slopes)
        fits = heads * self.tokens <= MOST_PAIRS
        self.need(fits, bridge or block, f"at most {MOST_PAIRS} pairs of heads and tokens")
        linear = self.side_by_side(made)
        (place,) = places.enter_context(self.places(self.tokens * linear.outputs))
        self.linear(self.tokens, self.at, linear, place)
        columns = padded(made[-1][0].out_features)
        scatter_at, gather_at = (place if slopes else -1), -1
        if bridge is not None:
            gather_at = place + (2 * columns if slopes else 0)
            self.gates, self.row = gather_at + columns, linear.outputs
        return _Made(Bridges(heads, self.tokens, linear.outputs, scatter_at, gather_at), slopes)

    def from_mobile(self, bridge: Any) -> None:
        """What Mobile -> Former does to the tokens, from what the last map's step gathered."""
        count, channels = self.tokens, bridge.channels
        with self.places(count * padded(channels)) as (gathered,):
            self.combine(count, channels, bridge.num_heads, gathered)
            if hasattr(bridge, "alpha"):
                self.gate(count, channels, gathered, self.gates, self.row)
            project = self.pack.linear(bridge.proj.weight, bridge.proj.bias)
            self.linear(count, gathered, project, self.at, added=True)
        self.norm(count, bridge.layer_norm, self.at, self.at)

    def former(self, former: Any) -> None:
        self.need(hasattr(former, "q") and not hasattr(former, "token_mlp"), former, "mixing by attention")
        self.need(not hasattr(former, "alpha"), former, "Formers without a gate")
        count, at, linear = self.tokens, self.at, self.pack.linear
        floats = count * padded(self.width)
        with self.places(floats, floats) as (queries, mixed):
            self.linear(count, at, linear(former.q.weight, former.q.bias), queries)
            # Keys and values are the tokens themselves.
            self.attend(count, former.num_heads, self.width, (queries, at, at), padded(self.width), mixed)
            mlp = former.channel_mlp
            self.linear(count, mixed, linear(mlp.weight, mlp.bias), at, added=True)
        self.norm(count, former.layer_norm, at, at)
        if not hasattr(former, "ffn"):
            return
        first, last = former.ffn[0], former.ffn[2]
        expand = linear(first.weight, first.bias)
        with self.places(count * expand.outputs) as (hidden,):
            self.linear(count, at, expand, hidden, activation="gelu")
            self.linear(count, hidden, linear(padded_rows(last.weight), last.bias), at, added=True)
        self.norm(count, former.ffn_norm, at, at)

    def hypers(self, block: Any, places: ExitStack) -> list[int]:
        """Where the slopes of both dynamic ReLUs are."""
        modules: list[Any]
        if isinstance(block, MobileFormerBlock):
            conv: Any = block.conv2[0]
            modules = [block.hyper1, block.hyper2]
            slots = 2 * [padded_slots(conv.out_channels)]
        else:
            modules = [block.hyper1, block.hyper3]
            convs = [(layers[0], layers[2]) for layers in (block.conv1, block.conv3)]
            slots = [padded_slots(conv.in_channels, _numbers(conv, shuffle)) for conv, shuffle in convs]
        squeeze = self.side_by_side([(module.hyper[0], 1.0) for module in modules])
        slopes = []
        with self.places(squeeze.outputs) as (hidden,):
            token = self.at + block.hyper1.token_id * padded(self.width)
            self.linear(1, token, squeeze, hidden, activation="relu")
            for module, channels in zip(modules, slots, strict=True):
                layer = module.hyper[2]
                weight, bias = padded_rows(layer.weight).double(), layer.bias.double()
                half = layer.out_features // 2
                both = [*channels, *(-1 if channel < 0 else channel + half for channel in channels)]
                linear = self.pack.linear(spread(weight, both), spread(bias, both))
                slopes += places.enter_context(self.places(linear.outputs))
                self.slopes(hidden, linear, slopes[-1])
                hidden += linear.inputs
        return slopes

    def side_by_side(self, layers: list[tuple[Any, float]]) -> Linear:
        """Layers of the same input as one matrix, each with padded outputs and multiplied by its factor."""
        weights = [padded_rows(layer.weight.double().t() * by).t() for layer, by in layers]
        return self.pack.linear(
            torch.cat(weights), torch.cat([padded_rows(layer.bias.double() * by) for layer, by in layers])
        )

    def check_bridge(self, bridge: Any) -> None:
        self.need(hasattr(bridge, "q") and not hasattr(bridge, "mlp"), bridge, "mixing by attention")
        self.need(not hasattr(bridge, "k"), bridge, "bridges without projections of the map")

    def check_scatter(self, scatter: Any) -> None:
        self.need(hasattr(scatter, "k") and not hasattr(scatter, "mlp"), scatter, "mixing by attention")
        self.need(not hasattr(scatter, "q"), scatter, "bridges without projections of the map")
        self.need(not hasattr(scatter, "alpha"), scatter, "a Mobile <- Former without a gate")

    # --- head --------------------------------------------------------------------------------------------

    def head(self, x: Map, head: Any) -> tuple[int, list[tuple[Linear, str | None]]]:
        """The place of the classifier's inputs, and its linear layers."""
        shuffle, conv, norm = head.conv
        act = head.act
        self.need(act.num_functions == 0, act, "a relu6 in the head")
        self.need(head.class_tokens != 0, head, "class tokens that are joined, not averaged,")
        weight, bias = fold(conv, norm)
        order = shuffled(shuffle, conv.in_channels)
        place = sorted(range(len(order)), key=order.__getitem__)  # the column that reads each channel
        last = self.pack.linear(dense(weight, conv.groups)[:, place], bias)
        width, count = padded(self.width), max(head.class_tokens, 0)
        features = self.place(last.outputs + count * width)
        with self.named("classifier.conv"):
            self.pooled(x, last, features)
            for i in range(count):  # each writes over the padding of the one before
                self.copy(self.at + i * width, width, features + last.outputs + i * self.width)
        linear, norm1d, _ = head.fc
        scale, shift = affine(norm1d)
        weight = linear.weight.double() * scale[:, None]
        weight = torch.cat([padded_rows(weight[:, : conv.out_channels]), weight[:, conv.out_channels :]], 1)
        fc = self.pack.linear(weight, linear.bias.double() * scale + shift)
        classifier = head.classifier[1]
        return features, [
            (fc, "hardswish"),
            (self.pack.linear(padded_rows(classifier.weight), classifier.bias), None),
        ]


def _made(conv: nn.Conv2d) -> list[int]:
    """The outputs of a depthwise convolution in the order of memory: the first that each input makes, then
    the second, ..."""
    times = conv.out_channels // conv.in_channels
    return [i * times + j for j in range(times) for i in range(conv.in_channels)]


def _numbers(conv: nn.Conv2d, shuffle: nn.Module) -> list[int]:
    """The same, each by its number after the shuffle."""
    number = {old: new for new, old in enumerate(shuffled(shuffle, conv.out_channels))}
    return [number[old] for old in _made(conv)]

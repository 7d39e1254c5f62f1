"""Mobile-Former as a plan."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
from ..nn.depthwise import MaxDepthwise
from .deployed import Deployed
from .mobile_former_blocks import Activated, Back, Made, activations, check, keys_and_values, steps_of
from .packing import Formats, dense, fold, padded, padded_rows, padded_slots, shuffled, spread
from .plan import MOST_PAIRS, NO_SLOPES, Bridges, Map, Plan, Slopes
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
        MaxDepthwise,
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


def deployed_mobile_former(model: MobileFormer, formats: Formats, wanted: Wanted | None = None) -> Deployed:
    """Return what `deploy` makes of a `MobileFormer`, or of these maps of it."""
    plan = MobileFormerPlan(model, formats)
    return plan.deployed(wanted)


class Outputs(NamedTuple):
    """A layer, which of its outputs are wanted, -1 for zeros, and what multiplies them."""

    layer: Any
    slots: Sequence[int]
    factor: float = 1.0


class MobileFormerPlan(Plan):
    """A Mobile-Former as steps."""

    def __init__(self, model: MobileFormer, formats: Formats) -> None:
        super().__init__(model, formats)
        self.check_parts(_KNOWN)
        self.model = model
        self.tokens, self.width = model.tokens.weight.shape
        self.at = self.place(self.tokens * padded(self.width))
        self.gates = self.row = 0  # of the last map's bridge, where it has any
        self.bridges: Bridges | None = None  # to the tokens, of the last map

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
        """Add the stem and these blocks; the bridge `last` reads the map after them."""
        for block in blocks.values():
            if type(block) not in _BLOCKS:
                raise self.refuse(block, "unknown to deploy")
            check(self, block)
        each: list[tuple[str, Any]] = [("stem", None), *blocks.items()]
        with self.named("stem tokens"):
            self.copy_weights(padded_rows(self.model.tokens.weight), self.at)
        x: Any = None
        read: Any = None
        before = ExitStack()
        for i, (name, block) in enumerate(each):
            following = each[i + 1][1] if i + 1 < len(each) else None
            bridge = last if following is None else getattr(following, "local_global", None)
            places = ExitStack()
            with self.named(f"{name} tokens"):
                made = self.token_step(read, block, bridge, places)
                if read is not x:
                    self.free(read)
            before.close()  # not sooner: its gates are read by this step
            before = places
            with self.named(name):
                x = self.stem(made.bridges) if block is None else steps_of(self, x, block, made)
                if made.attention is not None:
                    self.free(made.attention)
                if name in handed_out:
                    self.hand_out(x)
                read = self.projected(x, bridge)
            if following is None and read is not x:
                self.free(read)
        return x

    def projected(self, x: Map, bridge: Any) -> Map:
        """Return the map that `bridge` reads: x, or its keys and values."""
        if not hasattr(bridge, "k"):
            return x
        keys, values = keys_and_values(bridge.channels, bridge.num_heads)
        weights = [
            spread(layer.weight.flatten(1), slots) for layer, slots in ((bridge.k, keys), (bridge.v, values))
        ]
        linear = self.pack.linear(weights[0] + weights[1])
        return self.pointwise(x, 2 * bridge.channels, linear, bridges=self.bridges)

    def stem(self, bridges: Bridges | None) -> Map:
        stem: Any = self.model.stem
        conv, norm, _ = stem
        return self.dense(None, conv, *fold(conv, norm), "relu6", bridges)

    # --- tokens ------------------------------------------------------------------------------------------

    def token_step(self, x: Any, block: Any, bridge: Any, places: ExitStack) -> Made:
        """Add what `block`, whose first bridge reads x, does to the tokens.

        Return, in `places`, what the tokens give to the block and to the bridge that reads its map.
        """
        made: list[Outputs] = []
        slopes: list[Slopes] = []
        attention = None
        heads = 0
        scatter: Any = None
        if block is not None and not isinstance(block, LiteBottleneck):
            self.from_mobile(block.local_global)
            attention = self.attention_of(x, block)
            self.former(block.global_block)
            slopes = self.generated(activations(block), places, attention)
            scatter = block.global_local
            self.check_scatter(scatter)
            heads = scatter.num_heads
            keys, values = self.slots_of(scatter, "q")
            made += [
                Outputs(scatter.k, keys, (scatter.channels // heads) ** -0.5),
                Outputs(scatter.proj, values),
            ]
        scattered = len(made)
        if bridge is not None:
            self.check_bridge(bridge)
            self.need(heads in (0, bridge.num_heads), bridge, "the heads of the Mobile <- Former before it")
            heads = bridge.num_heads
            keys, gates = self.slots_of(bridge, "k")
            made += [Outputs(bridge.q, keys, (bridge.channels // heads) ** -0.5)]
            if hasattr(bridge, "alpha"):
                made += [Outputs(bridge.alpha[0], gates)]
        if not made:
            return Made(None, slopes, attention)
        if hasattr(scatter, "alpha"):
            made += [Outputs(scatter.alpha[0], values)]
        fits = heads * self.tokens <= MOST_PAIRS
        self.need(fits, bridge or block, f"at most {MOST_PAIRS} pairs of heads and tokens")
        linear = self.side_by_side(made)
        (place,) = places.enter_context(self.places(self.tokens * linear.outputs))
        self.linear(self.tokens, self.at, linear, place)
        row, at = linear.outputs, place
        back, gather = Bridges(heads, self.tokens, row), Bridges(heads, self.tokens, row)
        if scatter is not None:
            columns = padded(len(made[0].slots))
            if hasattr(scatter, "alpha"):
                self.gate(self.tokens, columns, place + columns, row, place + row - columns, row)
            back, at = back._replace(scatter=place), place + 2 * columns
        if bridge is not None:
            gather = gather._replace(gather=at)
            self.gates, self.row = at + padded(len(made[scattered].slots)), row
        self.bridges = gather if bridge is not None else None
        # A bridge with projections has a map of its own.
        apart = Back(scatter, back) if hasattr(scatter, "q") else None
        own = back if apart is None else back._replace(scatter=-1)
        own = own if hasattr(bridge, "k") else own._replace(gather=gather.gather)
        bridged = own.scatter >= 0 or own.gather >= 0
        return Made(own if bridged else None, slopes, attention, apart)

    def slots_of(self, bridge: Any, projection: str) -> tuple[list[int], list[int]]:
        """Return which channels the columns of keys or queries are, and those of values."""
        if hasattr(bridge, projection):
            return keys_and_values(bridge.channels, bridge.num_heads)
        each = list(range(bridge.channels))
        return each, each

    def attention_of(self, x: Map, block: Any) -> Map | None:
        """Return the weights that mix the slopes of all tokens at each position, where the block wants it.

        The tokens' queries are those before they changed.
        """
        if block.token_id >= 0 or not any(one.act.num_functions > 0 for one in activations(block)):
            return None
        one_size = block.stride == 1 or not isinstance(block, MobileFormerBlock)
        self.need(one_size, block, "mixed slopes in blocks whose activations are all of maps of one size")
        assert self.bridges is not None
        return self.weigh(x, block.stride, self.bridges)

    def from_mobile(self, bridge: Any) -> None:
        """Add what Mobile -> Former does to the tokens, from what the last map's step gathered."""
        _, values = self.slots_of(bridge, "k")
        count, channels = self.tokens, len(values)
        with self.places(count * padded(channels)) as (gathered,):
            self.combine(count, channels, bridge.num_heads, gathered)
            if hasattr(bridge, "alpha"):
                self.gate(count, channels, gathered, padded(channels), self.gates, self.row)
            project = self.pack.row_linear(spread(bridge.proj.weight.t(), values).t(), bridge.proj.bias)
            self.linear(count, gathered, project, self.at, added=True)
        self.norm(count, bridge.layer_norm, self.at, self.at)

    def former(self, former: Any) -> None:
        self.need(hasattr(former, "q") and not hasattr(former, "token_mlp"), former, "mixing by attention")
        count, at, linear = self.tokens, self.at, self.pack.row_linear
        width = padded(self.width)
        with self.places(count * width, count * width) as (queries, mixed):
            self.linear(count, at, linear(former.q.weight, former.q.bias), queries)
            # Keys and values are the tokens themselves.
            self.attend(count, former.num_heads, self.width, (queries, at, at), width, mixed)
            if hasattr(former, "alpha"):
                gate = former.alpha[0]
                self.linear(count, at, linear(gate.weight, gate.bias), queries)
                self.gate(count, self.width, mixed, width, queries, width)
            mlp = former.channel_mlp
            self.linear(count, mixed, linear(mlp.weight, mlp.bias), at, added=True)
        self.norm(count, former.layer_norm, at, at)
        if hasattr(former, "ffn"):
            self.feed_forward(former.ffn, former.ffn_norm)

    def feed_forward(self, layers: Any, norm: Any) -> None:
        """Add a feed-forward network of the tokens, its residual, and the norm after it."""
        count, at, linear = self.tokens, self.at, self.pack.row_linear
        first, last = layers[0], layers[2]
        expand = linear(first.weight, first.bias)
        with self.places(count * expand.outputs) as (hidden,):
            self.linear(count, at, expand, hidden, activation="gelu")
            self.linear(count, hidden, linear(padded_rows(last.weight), last.bias), at, added=True)
        self.norm(count, norm, at, at)

    def generated(
        self, each: list[Activated], places: ExitStack, attention: Map | None = None
    ) -> list[Slopes]:
        """Return the slopes of each activation.

        All are of the same token, or of all tokens where `attention` mixes them.
        """
        dynamic = [one for one in each if one.act.num_functions > 0]
        if not dynamic:
            return [NO_SLOPES] * len(each)
        rows, first = (1, dynamic[0].hyper.token_id) if attention is None else (self.tokens, 0)
        first_layers = [one.hyper.hyper[0] for one in dynamic]
        squeeze = self.side_by_side([Outputs(layer, range(layer.out_features)) for layer in first_layers])
        slopes = []
        with self.places(rows * squeeze.outputs) as (hidden,):
            self.linear(rows, self.at + first * padded(self.width), squeeze, hidden, activation="relu")
            for one in each:
                if one.act.num_functions < 1:
                    slopes.append(NO_SLOPES)
                    continue
                linear = self.slopes_of(one.hyper.hyper[2], one.act.num_functions, one.slots)
                (place,) = places.enter_context(self.places(2 * rows * len(one.slots)))
                self.slopes(rows, hidden, squeeze.outputs, one.act.num_functions, linear, place)
                slopes.append(Slopes(place) if attention is None else Slopes(place, attention.number, rows))
                hidden += linear.inputs
        return slopes

    def slopes_of(self, layer: Any, functions: int, slots: list[int]) -> Linear:
        """Return the second layer of a hyper network, its outputs those of `slots` for each function."""
        weight, bias = padded_rows(layer.weight).double(), layer.bias.double()
        size = layer.out_features // functions
        rows = [-1 if slot < 0 else slot + f * size for f in range(functions) for slot in slots]
        return self.pack.row_linear(spread(weight, rows), spread(bias, rows))

    def side_by_side(self, layers: list[Outputs]) -> Linear:
        """Pack layers of the same input as one matrix, each with padded outputs."""

        def of(rows: Tensor, wanted: Outputs) -> Tensor:
            return padded_rows(spread(rows.double(), wanted.slots).t()).t()

        weights = [of(wanted.layer.weight, wanted) for wanted in layers]
        biases = [of(wanted.layer.bias[:, None], wanted)[:, 0] * wanted.factor for wanted in layers]
        factors = [bias.new_full((len(bias),), by.factor) for bias, by in zip(biases, layers, strict=True)]
        return self.pack.row_linear(torch.cat(weights), torch.cat(biases), torch.cat(factors))

    def check_bridge(self, bridge: Any) -> None:
        self.need(hasattr(bridge, "q") and not hasattr(bridge, "mlp"), bridge, "mixing by attention")

    def check_scatter(self, scatter: Any) -> None:
        self.need(hasattr(scatter, "k") and not hasattr(scatter, "mlp"), scatter, "mixing by attention")

    # --- head --------------------------------------------------------------------------------------------

    def head(self, x: Map, head: Any) -> tuple[int, list[tuple[Linear, str | None]]]:
        """Return the place of the classifier's inputs, and its linear layers."""
        shuffle, conv, norm = head.conv
        weight, bias = fold(conv, norm)
        order = shuffled(shuffle, conv.in_channels)
        place = sorted(range(len(order)), key=order.__getitem__)  # the column that reads each channel
        last = self.pack.linear(dense(weight, conv.groups)[:, place], bias)
        averaged = head.class_tokens == 0
        width, count = padded(self.width), self.tokens if averaged else max(head.class_tokens, 0)
        features = self.place(last.outputs + (width if averaged else count * width))
        linear, norm1d, _ = head.fc
        scale, shift = affine(norm1d)
        bias = linear.bias.double() * scale + shift
        pooled, tokens = linear.weight.split([conv.out_channels, linear.in_features - conv.out_channels], 1)
        with self.named("classifier.conv"), ExitStack() as places:
            generator = Activated(head.act, getattr(head, "hyper", None), padded_slots(conv.out_channels))
            (slopes,) = self.generated([generator], places)
            self.pooled(x, last, features, slopes.place)
            if averaged:
                (positive,) = places.enter_context(self.places(count * width))
                same = torch.eye(width)
                self.linear(count, self.at, self.pack.row_linear(same), positive, activation="relu6")
                mean = self.pack.row_linear(torch.cat([same] * count, 1), factor=1 / count)
                self.linear(1, positive, mean, features + last.outputs)
            else:
                for i in range(count):  # each writes over the padding of the one before
                    self.copy(self.at + i * width, width, features + last.outputs + i * self.width)
        fc = self.pack.row_linear(torch.cat([padded_rows(pooled), tokens], 1), bias, scale)
        classifier = head.classifier[1]
        return features, [
            (fc, "hardswish"),
            (self.pack.row_linear(padded_rows(classifier.weight), classifier.bias), None),
        ]

"""Mobile-Former as a plan."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.mobile_former import MobileFormer
from ...nn import (
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
from ...nn.conv_bn import affine
from ...nn.depthwise import MaxDepthwise
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


def _projects(bridge: Any) -> bool:
    """Whether a bridge attends to, or by, projections of the map."""
    return hasattr(bridge, "q") and hasattr(bridge, "k")


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
            self.from_mobile(model.local_global, x)
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
                made = self.token_step(x, read, block, bridge, places)
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
        if not _projects(bridge):
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

    def token_step(self, x: Any, read: Any, block: Any, bridge: Any, places: ExitStack) -> Made:
        """Add what `block`, whose first bridge reads `read`, which was made of x, does to the tokens.

        Return, in `places`, what the tokens give to the block and to the bridge that reads its map.
        """
        made: dict[str, Outputs] = {}
        slopes: list[Slopes] = []
        attention = None
        heads = 0
        scatter: Any = None
        if block is not None and not isinstance(block, LiteBottleneck):
            self.from_mobile(block.local_global, x)
            attention = self.attention_of(read, block)
            self.former(block.global_block)
            slopes = self.generated(activations(block), places, attention)
            scatter = block.global_local
            self.check_mixing(scatter)
            keys, values = self.slots_of(scatter)
            if hasattr(scatter, "k"):
                heads = scatter.num_heads
                made["keys"] = Outputs(scatter.k, keys, (scatter.channels // heads) ** -0.5)
                made["values"] = Outputs(scatter.proj, values)
            if hasattr(scatter, "mlp"):
                made["mixed"] = Outputs(scatter.proj, range(scatter.channels))
        if bridge is not None:
            self.check_mixing(bridge)
            keys, gates = self.slots_of(bridge)
            if hasattr(bridge, "q"):
                fits = heads in (0, bridge.num_heads)
                self.need(fits, bridge, "the heads of the Mobile <- Former before it")
                heads = bridge.num_heads
                made["queries"] = Outputs(bridge.q, keys, (bridge.channels // heads) ** -0.5)
            if hasattr(bridge, "alpha"):
                made["gates"] = Outputs(bridge.alpha[0], gates)
        if not made:
            self.bridges = None
            return Made(None, slopes, attention)
        if hasattr(scatter, "alpha"):
            gated = [name for name in ("values", "mixed") if name in made]
            made |= {f"gates of {name}": made[name]._replace(layer=scatter.alpha[0]) for name in gated}
        fits = heads * self.tokens <= MOST_PAIRS
        self.need(fits, bridge or block, f"at most {MOST_PAIRS} pairs of heads and tokens")
        linear = self.side_by_side(list(made.values()))
        (place,) = places.enter_context(self.places(self.tokens * linear.outputs))
        self.linear(self.tokens, self.at, linear, place)
        row, at = linear.outputs, dict[str, int]()
        for name, wanted in made.items():
            at[name] = place
            place += padded(len(wanted.slots))
        for name in ("values", "mixed"):
            if f"gates of {name}" in at:
                columns = padded(len(made[name].slots))
                self.gate(self.tokens, columns, at[name], row, at[f"gates of {name}"], row)
        self.gates, self.row = at.get("gates", -1), row
        bridges = Bridges(heads, self.tokens, row, at.get("keys", -1), at.get("queries", -1))
        self.bridges = bridges._replace(scatter=-1) if "queries" in at else None
        # What has projections has a map of its own, and mixing of positions a step of its own.
        own, apart = bridges, None
        if _projects(scatter) or "mixed" in at:
            back = bridges._replace(gather=-1) if _projects(scatter) else None
            apart = Back(scatter, back, at.get("mixed", -1), row)
        if _projects(scatter):
            own = own._replace(scatter=-1)
        if _projects(bridge):
            own = own._replace(gather=-1)
        bridged = own.scatter >= 0 or own.gather >= 0
        return Made(own if bridged else None, slopes, attention, apart)

    def slots_of(self, bridge: Any) -> tuple[list[int], list[int]]:
        """Return which channels the columns of keys or queries are, and those of values."""
        if _projects(bridge):
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

    def from_mobile(self, bridge: Any, x: Map) -> None:
        """Add what Mobile -> Former does to the tokens: from what the last map's step gathered, or from x."""
        _, values = self.slots_of(bridge)
        count, channels = self.tokens, len(values)
        with self.places(*[count * padded(channels)] * 2) as (gathered, collected):
            if hasattr(bridge, "q"):
                self.combine(count, channels, bridge.num_heads, gathered)
            if _projects(bridge) and hasattr(bridge, "mlp"):  # to where the values of heads lie
                self.collect(x, bridge.mlp, collected)
                same = self.pack.row_linear(spread(torch.eye(x.channels), values))
                self.linear(count, collected, same, gathered, added=True)
            elif hasattr(bridge, "mlp"):
                self.collect(x, bridge.mlp, gathered, added=hasattr(bridge, "q"))
            if hasattr(bridge, "alpha"):
                self.gate(count, channels, gathered, padded(channels), self.gates, self.row)
            project = self.pack.row_linear(spread(bridge.proj.weight.t(), values).t(), bridge.proj.bias)
            self.linear(count, gathered, project, self.at, added=True)
        self.norm(count, bridge.layer_norm, self.at, self.at)

    def former(self, former: Any) -> None:
        self.need(hasattr(former, "q") or hasattr(former, "token_mlp"), former, "mixing of some kind")
        count, at, linear = self.tokens, self.at, self.pack.row_linear
        width = padded(self.width)
        with self.places(count * width, count * width) as (queries, mixed):
            if hasattr(former, "q"):
                self.linear(count, at, linear(former.q.weight, former.q.bias), queries)
                # Keys and values are the tokens themselves.
                self.attend(count, former.num_heads, self.width, (queries, at, at), width, mixed)
            if hasattr(former, "token_mlp"):
                self.mix_tokens(former.token_mlp, mixed, added=hasattr(former, "q"))
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

    def mix_tokens(self, mlp: Any, target: int, *, added: bool) -> None:
        """Store what an MLP over the tokens makes of each of their dimensions."""
        count, first, last = self.tokens, mlp[0], mlp[2]
        expand = self.pack.row_linear(first.weight, first.bias)
        project = self.pack.row_linear(padded_rows(last.weight), last.bias)
        with self.places(self.width * padded(count), self.width * expand.outputs) as (turned, hidden):
            self.turn(count, self.width, self.at, padded(self.width), turned)
            self.linear(self.width, turned, expand, hidden, activation="gelu")
            self.linear(self.width, hidden, project, turned)
            self.turn(self.width, count, turned, padded(count), target, added=added)

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

    def check_mixing(self, bridge: Any) -> None:
        attends = hasattr(bridge, "q" if isinstance(bridge, MobileToFormer) else "k")
        self.need(attends or hasattr(bridge, "mlp"), bridge, "mixing of some kind")

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

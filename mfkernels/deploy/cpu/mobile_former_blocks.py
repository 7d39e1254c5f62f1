"""The blocks of Mobile-Former as steps: one for each of the released ones, several for their variants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn import DynamicReLU, LiteBottleneck, MobileFormerBlock
from ...nn.depthwise import MaxDepthwise
from . import steps
from .packing import dense, fold, padded, padded_slots, shuffled, spread
from .plan import MOST_DEPTHWISE, NO_SLOPES, Bridges, Map, Plan, Slopes
from .steps import Linear

# By the functions of a DynamicReLU.
_ACTIVATIONS = {2: "dynamic_relu", 1: "scaled_relu6", 0: "relu6", -1: None}


class Back(NamedTuple):
    """A Mobile <- Former that is more than a bridge of the map.

    It has projections of the map, between which is a bridge; or mixes positions, of values at a place in rows
    of so many floats, -1 for none.
    """

    layers: Any
    bridges: Bridges | None
    values: int
    row: int


class Made(NamedTuple):
    """Hold what the tokens give to a block's steps.

    This is its map's bridges, the slopes of its activations, the map by which the slopes are mixed, if they
    are, and Mobile <- Former where it is more than a bridge.
    """

    bridges: Bridges | None
    slopes: list[Slopes]
    attention: Map | None = None
    back: Back | None = None


class Activated(NamedTuple):
    """An activation, what makes its coefficients, and which channel each of a map in memory is."""

    act: DynamicReLU
    hyper: Any
    slots: list[int]


def activations(block: Any) -> list[Activated]:
    """Those of a block with tokens, of its two hidden maps and of its output."""
    if isinstance(block, MobileFormerBlock):
        mobile: Any = block
        hidden, outputs = (padded_slots(x[0].out_channels) for x in (mobile.conv1, mobile.conv3))
        return [
            Activated(block.act1, block.hyper1, hidden),
            Activated(block.act2, block.hyper2, hidden),
            Activated(block.act3, block.hyper3, outputs),
        ]
    first, last = (_padded(part.slots()) for part in _parts(block))
    outputs = padded_slots(block.conv4[0].out_channels)
    return [
        Activated(block.act1, block.hyper1, first),
        Activated(block.act3, block.hyper3, last),
        Activated(block.act4, block.hyper4, outputs),
    ]


class _Depthwise(NamedTuple):
    """Hold depthwise convolutions with their batch norms, and the shuffle of their results.

    They run one after the other, or side by side where `maximum` takes the larger of both.
    """

    layers: list[tuple[nn.Conv2d, nn.BatchNorm2d]]
    maximum: bool
    shuffle: nn.Module

    def slots(self) -> list[int]:
        """Which channel, after the shuffle, each output in memory is; -1 for none."""
        slots = list(range(self.layers[0][0].in_channels))
        for conv, _ in self.layers[: 1 if self.maximum else None]:
            slots = _multiplied(slots, conv)
        channels = self.layers[-1][0].out_channels
        number = {old: new for new, old in enumerate(shuffled(self.shuffle, channels))} | {-1: -1}
        return [number[slot] for slot in slots]

    def plain(self) -> bool:
        """Whether it is one convolution of 3x3, of stride 1 or 2."""
        conv = self.layers[0][0]
        return len(self.layers) == 1 and conv.kernel_size == (3, 3) and conv.stride in ((1, 1), (2, 2))


def _parts(block: Any) -> list[_Depthwise]:
    """Add the depthwise convolutions of a block."""
    return [_part(layers, shuffle) for layers, shuffle in _depthwise_layers(block)]


def _depthwise_layers(block: Any) -> list[tuple[list[Any], nn.Module]]:
    """Those of each depthwise part of a block, and its shuffle."""
    if isinstance(block, MobileFormerBlock):
        return [(list(block.conv2), nn.Identity())]
    if isinstance(block, LiteBottleneck):
        *layers, _, shuffle, _, _ = block.conv
        return [(layers, shuffle)]
    each = [list(block.conv1), list(block.conv3)]
    return [(layers[:-1], layers[-1]) for layers in each]


def check(plan: Plan, block: Any) -> None:
    """Refuse other depthwise parts than are known, before anything else looks at them."""
    for layers, _ in _depthwise_layers(block):
        pair = [nn.Conv2d, nn.BatchNorm2d]
        known = any(
            len(layers) == len(kinds) and all(map(isinstance, layers, kinds))
            for kinds in ([MaxDepthwise], pair, pair * 2)
        )
        plan.need(known, block, "depthwise convolutions of one kernel or two")


def _part(layers: list[Any], shuffle: nn.Module) -> _Depthwise:
    if isinstance(layers[0], MaxDepthwise):
        branches: Any = [tuple(layers[0].conv1), tuple(layers[0].conv2)]
        return _Depthwise(branches, True, shuffle)
    return _Depthwise(list(zip(layers[::2], layers[1::2], strict=True)), False, shuffle)


def _multiplied(slots: Sequence[int], conv: nn.Conv2d) -> list[int]:
    """Return which channels a depthwise convolution's outputs in memory are.

    It may give several channels for each of its inputs, which are `slots`: the first output of each input
    comes first, then the second, ...
    """
    times = conv.out_channels // conv.in_channels
    if times == 1:
        return list(slots)
    return [slot * times + j if slot >= 0 else -1 for j in range(times) for slot in _padded(slots)]


def _padded(slots: Sequence[int]) -> list[int]:
    return [*slots, *[-1] * (padded(len(slots)) - len(slots))]


def steps_of(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    if isinstance(block, LiteBottleneck):
        return plan.replaced(x, _lite(plan, x, block, made))
    is_block = isinstance(block, MobileFormerBlock)
    steps_of_kind = _block if is_block else _down
    if made.back is None or (block.skip and (not is_block or block.before_skip)):
        return plan.replaced(x, steps_of_kind(plan, x, block, made))
    scatter, gather = _split(made.bridges)
    before = Made(scatter, made.slopes, made.attention)
    x = plan.replaced(x, steps_of_kind(plan, x, block, before))
    return _taken(plan, x, made.back, gather)


def keys_and_values(channels: int, heads: int) -> tuple[list[int], list[int]]:
    """Return which key each channel is, and which value, of a map that holds both; -1 for none.

    The keys and values of a head stand side by side, so that a bridge reads the one and uses the other.
    """
    width = channels // heads
    own = [list(range(head * width, (head + 1) * width)) for head in range(heads)]
    none = [-1] * width
    return [i for each in own for i in (*each, *none)], [i for each in own for i in (*none, *each)]


def _taken(plan: Plan, x: Map, back: Back, bridges: Bridges | None = None) -> Map:
    """Add to a map what it takes from the tokens by this Mobile <- Former; then other bridges."""
    if back.bridges is not None:
        x = _projected(plan, x, back.layers, back.bridges, bridges if back.values < 0 else None)
    if back.values < 0:
        return x
    return plan.replaced(x, plan.spread(x, back.layers.mlp, back.values, back.row, bridges))


def _projected(plan: Plan, x: Map, layers: Any, back: Bridges, bridges: Bridges | None) -> Map:
    queries, results = keys_and_values(x.channels, back.heads)
    project = plan.pack.map_linear(spread(layers.q.weight.flatten(1), queries))
    mixed = plan.pointwise(x, 2 * x.channels, project, bridges=back)
    fuse = plan.pack.map_linear(spread(layers.fuse.weight.flatten(1).t(), results).t())
    out = plan.replaced(mixed, plan.pointwise(mixed, x.channels, fuse, added=x, bridges=bridges))
    return plan.replaced(x, out)


def _split(bridges: Bridges | None) -> tuple[Bridges | None, Bridges | None]:
    """Of a map's bridges, that from the tokens and that to them."""
    if bridges is None:
        return None, None
    scatter, gather = bridges._replace(gather=-1), bridges._replace(scatter=-1)
    return scatter if scatter.scatter >= 0 else None, gather if gather.gather >= 0 else None


def _lite(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    *_, shuffle, point, point_norm = block.conv
    (part,) = _parts(block)
    if not part.plain():
        hidden, slots = _depthwise(plan, x, part, "relu6")
        added = x if block.skip else None
        return plan.replaced(
            hidden, _pointwise(plan, hidden, point, point_norm, slots, added=added, bridges=made.bridges)
        )
    ((conv, norm),) = part.layers
    taps, hidden_channels, order = _multiplying(plan, conv, norm, shuffle)
    linear = _folded(plan, point, point_norm, order, nn.Identity(), len(order) // conv.in_channels)
    out = plan.out(point.out_channels, 0, made.bridges)
    stride, residual = conv.stride[0], int(block.skip)
    return plan.made("lite", steps.Lite(out, *x, stride, residual, hidden_channels, taps, linear))


def _block(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    point1, norm1, shuffle1 = block.conv1
    point2, norm2, shuffle2 = block.conv3
    (part,) = _parts(block)
    plain = part.plain() and block.stride == 1 and not block.before_skip
    if not plain or _functions(block) != [2, 2, -1]:
        return _composed_block(plan, x, block, made)
    ((conv, norm),) = part.layers
    plan.need(conv.stride == (1, 1), conv, "depthwise convolutions of the block's stride")
    channels = conv.out_channels
    first, last, _ = made.slopes
    rounds = last.attention < 0  # both products or none
    expand = _folded(plan, point1, norm1, range(point1.in_channels), shuffle1, rounds=rounds)
    taps = plan.pack.depthwise(*fold(conv, norm), padded_slots(channels))
    project = _folded(plan, point2, norm2, range(channels), shuffle2, rounds=rounds)
    out, residual = plan.out(point2.out_channels, 0, made.bridges), int(block.skip)
    return plan.made(
        "block",
        steps.Block(out, *x, residual, padded(channels), taps, first.place, *last, expand, project),
    )


def _composed_block(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    point1, norm1, shuffle1 = block.conv1
    point2, norm2, shuffle2 = block.conv3
    (part,), names = _parts(block), _names(block)
    first: dict[str, Any] = dict(activation=names[0], slopes=made.slopes[0], shuffle=shuffle1)
    hidden = _pointwise(plan, x, point1, norm1, range(point1.in_channels), **first)
    moved, slots = _depthwise(plan, hidden, part, names[1], made.slopes[1])
    hidden = plan.replaced(hidden, moved)
    options: dict[str, Any] = dict(activation=names[2], slopes=made.slopes[2], shuffle=shuffle2)
    if not block.skip:
        out = _pointwise(plan, hidden, point2, norm2, slots, bridges=made.bridges, **options)
    elif block.before_skip:
        scatter, gather = _split(made.bridges)
        out = _pointwise(plan, hidden, point2, norm2, slots, bridges=scatter, **options)
        if made.back is not None:
            out = _taken(plan, out, made.back)
        out = plan.replaced(out, plan.add(out, x, gather))
    else:
        out = _sum(plan, hidden, point2, norm2, slots, x, made.bridges, options)
    return plan.replaced(hidden, out)


def _down(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    first, last = _parts(block)
    (point1, point_norm1), (point2, point_norm2) = block.conv2, block.conv4
    plain = first.plain() and last.plain() and not block.skip
    if not plain or _functions(block) != [2, 2, -1]:
        return _composed_down(plan, x, block, made)
    ((conv1, norm1),), ((conv3, norm3),) = first.layers, last.layers
    plan.need(conv3.stride == (1, 1), block, "a second depthwise convolution of stride 1")
    taps1, hidden1, order = _multiplying(plan, conv1, norm1, first.shuffle)
    slopes1, slopes2, _ = made.slopes
    rounds, no_shuffle = slopes2.attention < 0, nn.Identity()
    runs = len(order) // conv1.in_channels
    project1 = _folded(plan, point1, point_norm1, order, no_shuffle, runs, rounds=rounds)
    taps2, hidden2, order = _multiplying(plan, conv3, norm3, last.shuffle)
    runs = len(order) // conv3.in_channels
    project2 = _folded(plan, point2, point_norm2, order, no_shuffle, runs, rounds=rounds)
    out = plan.out(conv3.in_channels, 0, made.bridges)
    return plan.made(
        "down",
        steps.Down(
            *(out, *x, conv1.stride[0]),
            *(hidden1, taps1, slopes1.place),
            *(hidden2, taps2, *slopes2),
            *(project1, project2),
        ),
    )


def _composed_down(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    (first, last), names = _parts(block), _names(block)
    (point1, point_norm1), (point2, point_norm2) = block.conv2, block.conv4
    hidden, slots = _depthwise(plan, x, first, names[0], made.slopes[0])
    middle = plan.replaced(hidden, _pointwise(plan, hidden, point1, point_norm1, slots))
    hidden, slots = _depthwise(plan, middle, last, names[1], made.slopes[1])
    scatter, gather = _split(made.bridges)
    inner = scatter if block.skip else made.bridges
    options: dict[str, Any] = dict(activation=names[2], slopes=made.slopes[2])
    out = plan.replaced(hidden, _sum(plan, hidden, point2, point_norm2, slots, middle, inner, options))
    out = plan.replaced(middle, out)
    if not block.skip:
        return out
    if made.back is not None:
        out = _taken(plan, out, made.back)
    return plan.replaced(out, plan.add(out, x, gather))


def _sum(
    plan: Plan,
    x: Map,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    slots: Sequence[int],
    added: Map,
    bridges: Bridges | None,
    options: dict[str, Any],
) -> Map:
    """Add a 1x1 convolution, its activation, and another map."""
    if options["activation"] is None:
        return _pointwise(plan, x, conv, norm, slots, added=added, bridges=bridges, **options)
    out = _pointwise(plan, x, conv, norm, slots, **options)
    return plan.replaced(out, plan.add(out, added, bridges))


def _functions(block: Any) -> list[int]:
    return [act.num_functions for act, _, _ in activations(block)]


def _names(block: Any) -> list[str | None]:
    """Of the activations. One that only multiplies is a dynamic ReLU with the same slope on both sides."""
    return [
        "dynamic_relu" if act.num_functions == 1 and not act.relu6_first else _ACTIVATIONS[act.num_functions]
        for act, _, _ in activations(block)
    ]


def _depthwise(
    plan: Plan, x: Map, part: _Depthwise, activation: str | None, slopes: Slopes = NO_SLOPES
) -> tuple[Map, list[int]]:
    """Add depthwise convolutions that may multiply channels.

    Return also which channel, after the shuffle, each of their outputs in memory is.
    """
    numbers, last = list(range(x.channels)), dict[str, Any](activation=activation, slopes=slopes)
    if part.maximum:
        one, other = (_square(plan, x, numbers, *layer, _stride(plan, layer[0])) for layer in part.layers)
        out = plan.replaced(other, plan.replaced(one, plan.add(one, other, maximum=True)))
        if activation is not None:
            out = plan.replaced(out, _activated(plan, out, last))
        return out, part.slots()
    if len(part.layers) == 1:
        ((conv, norm),) = part.layers
        return _square(plan, x, numbers, conv, norm, _stride(plan, conv), **last), part.slots()
    # The second takes every row of the first that a stride leaves, and every pixel of it.
    (conv, norm), (conv2, norm2) = part.layers
    fits = conv.stride[1] == conv2.stride[0] == 1 and conv.stride[0] == conv2.stride[1] <= MOST_DEPTHWISE
    fits = fits and conv.kernel_size[1] == conv2.kernel_size[0] == 1
    plan.need(fits, conv, "a convolution of columns and one of rows, of the same stride")
    hidden = _square(plan, x, numbers, conv, norm, 1)
    out = _square(plan, hidden, _multiplied(numbers, conv), conv2, norm2, conv.stride[0], **last)
    return plan.replaced(hidden, out), part.slots()


def _stride(plan: Plan, conv: nn.Conv2d) -> int:
    stride, across = conv.stride
    plan.need(stride == across <= MOST_DEPTHWISE, conv, "depthwise convolutions of one stride")
    return stride


def _square(
    plan: Plan,
    x: Map,
    slots: Sequence[int],
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    stride: int,
    **options: Any,
) -> Map:
    """Return a depthwise convolution as one of a square kernel.

    The channels of its map in memory are `slots`.
    """
    height, width = conv.kernel_size
    size = max(height, width)
    fits = size % 2 == 1 and size <= MOST_DEPTHWISE and {height, width} <= {1, size}
    fits = fits and conv.groups == conv.in_channels and conv.padding == (height // 2, width // 2)
    plan.need(
        fits, conv, "depthwise convolutions of odd squares, or of a line of them, padded by half of them"
    )
    weight, bias = fold(conv, norm)
    sides, ends = (size - width) // 2, (size - height) // 2
    weight = F.pad(weight, (sides, sides, ends, ends))
    outputs = _padded(_multiplied(slots, conv))
    taps = plan.pack.depthwise(weight, bias, outputs)
    several = conv.out_channels > conv.in_channels
    made = len(outputs) if several else x.channels
    return plan.depthwise(
        x, size, taps, taps + size * size * len(outputs), stride=stride, outputs=made, **options
    )


def _activated(plan: Plan, x: Map, options: dict[str, Any]) -> Map:
    """Add an activation alone: that of a convolution which changes nothing."""
    weight: Tensor = torch.zeros(x.channels, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    taps = plan.pack.depthwise(weight, torch.zeros(x.channels), padded_slots(x.channels))
    return plan.depthwise(x, 3, taps, taps + 9 * padded(x.channels), **options)


def _multiplying(
    plan: Plan, conv: nn.Conv2d, norm: nn.BatchNorm2d, shuffle: nn.Module
) -> tuple[int, int, list[int]]:
    """Pack a depthwise convolution that may give several channels for each input.

    Return the place of its taps, its padded channels, and the numbers, after the shuffle, of its outputs in
    the order of memory.
    """
    fits = conv.groups == conv.in_channels and conv.stride in ((1, 1), (2, 2)) and conv.padding == (1, 1)
    plan.need(fits, conv, "depthwise convolutions padded by half of them")
    inputs, times = conv.in_channels, conv.out_channels // conv.in_channels
    offset = plan.pack.depthwise(*fold(conv, norm), padded_slots(inputs, _in_memory(conv)))
    return offset, times * padded(inputs), _numbers(conv, shuffle)


def _pointwise(
    plan: Plan,
    x: Map,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    slots: Sequence[int],
    *,
    shuffle: nn.Module | None = None,
    **options: Any,
) -> Map:
    """Add a 1x1 convolution of a map whose channels are those of `slots`; its outputs are shuffled."""
    linear = _folded(plan, conv, norm, slots, shuffle or nn.Identity())
    return plan.pointwise(x, conv.out_channels, linear, **options)


def _folded(
    plan: Plan,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    slots: Sequence[int],
    shuffle: nn.Module,
    runs: int = 1,
    *,
    rounds: bool = True,
) -> Linear:
    """Return the matrix of a 1x1 convolution.

    Its inputs lie in memory in the order of `slots`, -1 for none, in this number of runs; its outputs are
    shuffled. It may be int8 where it `rounds` its inputs.
    """
    weight, bias = fold(conv, norm)
    rows = shuffled(shuffle, conv.out_channels)
    matrix = spread(dense(weight, conv.groups)[rows].t(), slots).t()
    pack = plan.pack.map_linear if rounds else plan.pack.linear
    return pack(matrix, bias[rows], runs=runs)


def _in_memory(conv: nn.Conv2d) -> list[int]:
    """Return the outputs of a depthwise convolution in the order of memory.

    The first output of each input comes first, then the second, ...
    """
    times = conv.out_channels // conv.in_channels
    return [i * times + j for j in range(times) for i in range(conv.in_channels)]


def _numbers(conv: nn.Conv2d, shuffle: nn.Module) -> list[int]:
    """Return the same, each by its number after the shuffle."""
    number = {old: new for new, old in enumerate(shuffled(shuffle, conv.out_channels))}
    return [number[old] for old in _in_memory(conv)]

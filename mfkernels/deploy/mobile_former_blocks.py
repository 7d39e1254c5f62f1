"""The blocks of Mobile-Former as steps: one for each of the released ones, several for their variants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..nn import DynamicReLU, LiteBottleneck, MobileFormerBlock
from . import steps
from .packing import dense, fold, padded, padded_slots, shuffled, spread
from .plan import Bridges, Map, Plan
from .steps import Linear

# By the functions of a DynamicReLU.
_ACTIVATIONS = {2: "dynamic_relu", 1: "scaled_relu6", 0: "relu6", -1: None}


class Made(NamedTuple):
    """What the tokens make for a pass: its map's bridges, and where the slopes of its activations are."""

    bridges: Bridges | None
    slopes: list[int]


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
    layers: list[Any] = [block.conv1, block.conv3]
    first, last = (padded_slots(conv.in_channels, _numbers(conv, shuffle)) for conv, _, shuffle in layers)
    outputs = padded_slots(block.conv4[0].out_channels)
    return [
        Activated(block.act1, block.hyper1, first),
        Activated(block.act3, block.hyper3, last),
        Activated(block.act4, block.hyper4, outputs),
    ]


def check(plan: Plan, block: Any) -> None:
    """Refuse depthwise convolutions of several kernels, before anything else looks at them."""
    if isinstance(block, MobileFormerBlock):
        layers = [(block.conv2, 2)]
    elif isinstance(block, LiteBottleneck):
        layers = [(block.conv, 6)]
    else:
        layers = [(block.conv1, 3), (block.conv3, 3)]
    plan.need(
        all(len(found) == count for found, count in layers), block, "depthwise convolutions of one kernel"
    )


def steps_of(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    if isinstance(block, LiteBottleneck):
        return plan.replaced(x, _lite(plan, x, block, made))
    if isinstance(block, MobileFormerBlock):
        return plan.replaced(x, _block(plan, x, block, made))
    return plan.replaced(x, _down(plan, x, block, made))


def _lite(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    conv, norm, _, shuffle, point, point_norm = block.conv
    if conv.kernel_size != (3, 3):
        hidden, slots = _depthwise(plan, x, conv, norm, shuffle, "relu6")
        added = x if block.skip else None
        return plan.replaced(
            hidden, _pointwise(plan, hidden, point, point_norm, slots, added=added, bridges=made.bridges)
        )
    taps, hidden_channels, order = _multiplying(plan, conv, norm, shuffle)
    linear = _folded(plan, point, point_norm, order, nn.Identity(), len(order) // conv.in_channels)
    out = plan.out(point.out_channels, 0, made.bridges)
    stride, residual = conv.stride[0], int(block.skip)
    return plan.made("lite", steps.Lite(out, *x, stride, residual, hidden_channels, taps, linear))


def _block(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    point1, norm1, shuffle1 = block.conv1
    conv, norm = block.conv2
    point2, norm2, shuffle2 = block.conv3
    channels = conv.out_channels
    plain = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and not block.before_skip
    if not plain or _functions(block) != [2, 2, -1]:
        return _composed_block(plan, x, block, made)
    expand = _folded(plan, point1, norm1, range(point1.in_channels), shuffle1)
    taps = plan.pack.depthwise(*fold(conv, norm), padded_slots(channels))
    project = _folded(plan, point2, norm2, range(channels), shuffle2)
    out, residual = plan.out(point2.out_channels, 0, made.bridges), int(block.skip)
    first, last, _ = made.slopes
    return plan.made(
        "block", steps.Block(out, *x, residual, padded(channels), taps, first, last, expand, project)
    )


def _composed_block(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    point1, norm1, shuffle1 = block.conv1
    conv, norm = block.conv2
    point2, norm2, shuffle2 = block.conv3
    names = _names(block)
    first: dict[str, Any] = dict(activation=names[0], slopes=made.slopes[0], shuffle=shuffle1)
    hidden = _pointwise(plan, x, point1, norm1, range(point1.in_channels), **first)
    moved, slots = _depthwise(plan, hidden, conv, norm, nn.Identity(), names[1], made.slopes[1])
    hidden = plan.replaced(hidden, moved)
    options: dict[str, Any] = dict(activation=names[2], slopes=made.slopes[2], shuffle=shuffle2)
    if not block.skip:
        out = _pointwise(plan, hidden, point2, norm2, slots, bridges=made.bridges, **options)
    elif block.before_skip:
        assert made.bridges is not None
        scatter, gather = made.bridges._replace(gather=-1), made.bridges._replace(scatter=-1)
        out = _pointwise(plan, hidden, point2, norm2, slots, bridges=scatter, **options)
        out = plan.replaced(out, plan.add(out, x, gather if gather.gather >= 0 else None))
    else:
        out = _sum(plan, hidden, point2, norm2, slots, x, made.bridges, options)
    return plan.replaced(hidden, out)


def _down(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    conv1, norm1, shuffle1 = block.conv1
    conv3, norm3, shuffle3 = block.conv3
    (point1, point_norm1), (point2, point_norm2) = block.conv2, block.conv4
    plain = conv1.kernel_size == conv3.kernel_size == (3, 3) and not block.skip
    if not plain or _functions(block) != [2, 2, -1]:
        return _composed_down(plan, x, block, made)
    plan.need(conv3.stride == (1, 1), block, "a second depthwise convolution of stride 1")
    taps1, hidden1, order = _multiplying(plan, conv1, norm1, shuffle1)
    project1 = _folded(plan, point1, point_norm1, order, nn.Identity(), len(order) // conv1.in_channels)
    taps2, hidden2, order = _multiplying(plan, conv3, norm3, shuffle3)
    project2 = _folded(plan, point2, point_norm2, order, nn.Identity(), len(order) // conv3.in_channels)
    out, (slopes1, slopes2, _) = plan.out(conv3.in_channels, 0, made.bridges), made.slopes
    return plan.made(
        "down",
        steps.Down(
            *(out, *x, conv1.stride[0]),
            *(hidden1, taps1, slopes1),
            *(hidden2, taps2, slopes2),
            *(project1, project2),
        ),
    )


def _composed_down(plan: Plan, x: Map, block: Any, made: Made) -> Map:
    (conv1, norm1, shuffle1), (conv3, norm3, shuffle3) = block.conv1, block.conv3
    (point1, point_norm1), (point2, point_norm2) = block.conv2, block.conv4
    names = _names(block)
    hidden, slots = _depthwise(plan, x, conv1, norm1, shuffle1, names[0], made.slopes[0])
    middle = plan.replaced(hidden, _pointwise(plan, hidden, point1, point_norm1, slots))
    hidden, slots = _depthwise(plan, middle, conv3, norm3, shuffle3, names[1], made.slopes[1])
    bridges = made.bridges
    assert bridges is not None
    inner = bridges._replace(gather=-1) if block.skip else bridges
    options: dict[str, Any] = dict(activation=names[2], slopes=made.slopes[2])
    out = plan.replaced(hidden, _sum(plan, hidden, point2, point_norm2, slots, middle, inner, options))
    out = plan.replaced(middle, out)
    if not block.skip:
        return out
    outer = bridges._replace(scatter=-1)
    return plan.replaced(out, plan.add(out, x, outer if outer.gather >= 0 else None))


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
    """A 1x1 convolution, its activation, and another map."""
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
    plan: Plan,
    x: Map,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    shuffle: nn.Module,
    activation: str | None,
    slopes: int = -1,
) -> tuple[Map, list[int]]:
    """A depthwise convolution that may multiply channels; and which channel, after the shuffle, each of its
    outputs in memory is."""
    taps, hidden, order = _multiplying(plan, conv, norm, shuffle)
    several = len(order) > conv.in_channels
    size, outputs = conv.kernel_size[0], hidden if several else None
    options: dict[str, Any] = dict(activation=activation, slopes=slopes, outputs=outputs)
    out = plan.depthwise(x, size, taps, taps + size * size * hidden, stride=conv.stride[0], **options)
    return out, padded_slots(conv.in_channels, order) if several else order


def _multiplying(
    plan: Plan, conv: nn.Conv2d, norm: nn.BatchNorm2d, shuffle: nn.Module
) -> tuple[int, int, list[int]]:
    """Of a depthwise convolution that may make several channels of each: where its taps are, its padded
    channels, and the numbers, after the shuffle, of its outputs in the order of memory."""
    (size, other), stride = conv.kernel_size, conv.stride
    fits = size == other and size in (3, 5) and conv.groups == conv.in_channels
    fits = fits and stride in ((1, 1), (2, 2)) and conv.padding == (size // 2, size // 2)
    plan.need(fits, conv, "depthwise convolutions of 3x3 and 5x5, of stride 1 and 2")
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
    """A 1x1 convolution of a map whose channels are those of `slots`; its outputs are shuffled."""
    linear = _folded(plan, conv, norm, slots, shuffle or nn.Identity())
    return plan.pointwise(x, conv.out_channels, linear, **options)


def _folded(
    plan: Plan, conv: nn.Conv2d, norm: nn.BatchNorm2d, slots: Sequence[int], shuffle: nn.Module, runs: int = 1
) -> Linear:
    """The matrix of a 1x1 convolution; its inputs lie in memory in the order of `slots`, -1 for none, in so
    many runs; its outputs are shuffled."""
    weight, bias = fold(conv, norm)
    rows = shuffled(shuffle, conv.out_channels)
    matrix = spread(dense(weight, conv.groups)[rows].t(), slots).t()
    return plan.pack.linear(matrix, bias[rows], runs=runs)


def _in_memory(conv: nn.Conv2d) -> list[int]:
    """The outputs of a depthwise convolution in the order of memory: the first that each input makes, then
    the second, ..."""
    times = conv.out_channels // conv.in_channels
    return [i * times + j for j in range(times) for i in range(conv.in_channels)]


def _numbers(conv: nn.Conv2d, shuffle: nn.Module) -> list[int]:
    """The same, each by its number after the shuffle."""
    number = {old: new for new, old in enumerate(shuffled(shuffle, conv.out_channels))}
    return [number[old] for old in _in_memory(conv)]

"""A network as a plan for the kernels in csrc/cpu/engine/deployed_plan.h."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import steps
from .deployed import Deployed
from .packing import Formats, padded, padded_rows, padded_slots
from .planner import Planner
from .pyramid import ChainMaps, DeployedPyramid, Result, Wanted, sizes_of
from .steps import ACTIVATIONS, GATINGS, KINDS, NORMS, RESAMPLINGS, SAME_PADDING, SIZES, Linear, MapOut

MOST_STEPS, MOST_SIZE = 4096, 15  # of a plan; of a dense convolution's kernel and stride
MOST_DEPTHWISE = 255  # of a depthwise convolution's kernel and stride
MOST_PAIRS = 65536  # of heads and tokens


class Map(NamedTuple):
    """A feature map: the number of its memory, and its channels."""

    number: int
    channels: int


class Bridges(NamedTuple):
    """Name the cross attentions of a map and tokens.

    These are heads, tokens, floats from token to token, and the places of keys and values of the one and
    queries of the other; -1 for none.
    """

    heads: int
    tokens: int
    row: int
    scatter: int = -1
    gather: int = -1


class Slopes(NamedTuple):
    """Name the place of an activation's slopes, and the map that mixes them; -1 for none.

    The map holds the weights by which this number of tokens' slopes are mixed at each position.
    """

    place: int = -1
    attention: int = -1
    tokens: int = 0


NO_SLOPES = Slopes()


class Plan(Planner):
    """A plan in the making. Steps that write a map return it, in memory that no living map has."""

    def __init__(self, model: nn.Module, formats: Formats) -> None:
        super().__init__(model, formats)
        self.steps: list[int] = []
        self.parts: list[str] = []
        self.part = ""
        self.living: set[int] = set()
        self.keeps = False  # whether maps that are handed out are kept for what follows
        self.kept: list[Map] = []
        self.maps = self.state = 0
        self.spare: list[tuple[int, int]] = []  # (floats, place) of the state

    def run(self) -> Deployed:
        """Add all steps, and return the network."""
        raise NotImplementedError

    def pyramid(self, wanted: Wanted) -> Any:
        """Add the steps of these maps, and return the network."""
        raise NotImplementedError

    def deployed(self, wanted: Wanted | None) -> Any:
        """Return the network, or that of these maps, or what is made of them."""
        if wanted is None:
            return self.run()
        self.keeps = wanted.following is not None
        return self.pyramid(wanted)

    @contextmanager
    def named(self, part: str) -> Iterator[None]:
        """Give the steps within the block to this part."""
        before, self.part = self.part, part
        yield
        self.part = before

    def place(self, floats: int) -> int:
        """Of so many floats in the state."""
        place = self.state
        self.state += padded(floats)
        return place

    @contextmanager
    def places(self, *floats: int) -> Iterator[list[int]]:
        """Of so many floats in the state, for the steps within: the next ones find them in cache."""
        taken = []
        for count in map(padded, floats):
            fitting = min((one for one in self.spare if one[0] >= count), default=None)
            if fitting is None:
                fitting = (count, self.place(count))
            else:
                self.spare.remove(fitting)
            taken.append(fitting)
        yield [place for _, place in taken]
        self.spare += taken

    def free(self, used: Map) -> None:
        if used not in self.kept:
            self.living.remove(used.number)

    def release(self, kept: Map) -> None:
        """Free a map that was kept."""
        self.kept.remove(kept)
        self.free(kept)

    def replaced(self, old: Map, new: Map) -> Map:
        """Return `new`, after which nobody reads `old`."""
        self.free(old)
        return new

    def _step(self, kind: str, fields: Any) -> None:
        numbers = list(steps.numbers(fields))
        self.parts.append(self.part)
        head = steps.Step(list(KINDS).index(kind), len(numbers), self.pack.size)
        self.steps += [*head, *numbers]

    def out(self, channels: int, sums: int = 0, bridges: Bridges | None = None) -> MapOut:
        number = next(i for i in range(len(self.living) + 1) if i not in self.living)
        self.living.add(number)
        self.maps = max(self.maps, number + 1)
        return MapOut(number, channels, sums, *(bridges or ()))

    def made(self, kind: str, fields: Any) -> Map:
        self._step(kind, fields)
        return Map(fields.out.map, fields.out.channels)

    # --- steps that write a map --------------------------------------------------------------------------

    def dense(
        self,
        x: Map | None,
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor,
        activation: str | None = None,
        bridges: Bridges | None = None,
        sums: int = 0,
    ) -> Map:
        """Add a dense convolution, folded to this weight and bias; of the image where x is None."""
        outputs, inputs = weight.shape[0], conv.in_channels
        size, stride, padding = self.sizes(conv, MOST_SIZE)
        self.need(x is not None or conv.groups == 1, conv, "convolutions of the image without groups")
        limits = f"squares up to {MOST_SIZE}x{MOST_SIZE}, padded by half of them or less"
        self.need(size > 0, conv, f"dense convolutions of {limits}")
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        if x is None:
            linear = self.pack.linear(matrix, bias, runs=size)
        else:
            runs = size**2 if conv.groups > 1 else 1
            linear = self.pack.map_linear(matrix, bias, runs=runs, groups=conv.groups)
        kind, number = ("image_conv", -1) if x is None else ("dense_conv", x.number)
        out, act = self.out(outputs, sums, bridges), ACTIVATIONS.index(activation)
        numbers = (number, inputs, size, stride, padding, conv.groups)
        return self.made(kind, steps.Conv(out, *numbers, act, linear))

    def sizes(self, layer: nn.Conv2d | nn.MaxPool2d, most: int) -> tuple[int, int, int]:
        """Return kernel, stride and padding; zeros where they are not those of squares, or more than `most`.

        The padding must be half of the kernel or less, or `SAME_PADDING`.
        """
        size, stride, padding = sizes_of(layer)
        if size is None or stride is None or padding is None or max(size, stride) > most:
            return 0, 0, 0
        return (size, stride, padding) if SAME_PADDING <= padding <= size // 2 else (0, 0, 0)

    def pointwise(
        self,
        x: Map,
        outputs: int,
        linear: Linear,
        *,
        groups: int = 1,
        activation: str | None = None,
        slopes: Slopes = NO_SLOPES,
        mixed: bool = False,
        added: Map | None = None,
        affine: int = -1,
        affine_gelu: bool = False,
        sums: int = 0,
        bridges: Bridges | None = None,
    ) -> Map:
        """Add a 1x1 convolution; `linear` is as `Packer.linear` gives it."""
        other = -1 if added is None else added.number
        out, act = self.out(outputs, sums, bridges), ACTIVATIONS.index(activation)
        numbers = (x.number, x.channels, affine, affine_gelu, other, groups, act, *slopes, mixed, linear)
        return self.made("pointwise", steps.Pointwise(out, *numbers))

    def depthwise_weights(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> tuple[int, int, int]:
        """Of a depthwise convolution, folded to this weight and bias: its size, where taps and biases are.

        It is one of an odd square, padded by half of it.
        """
        size, _, padding = self.sizes(conv, MOST_DEPTHWISE)
        fits = size % 2 == 1 and padding == size // 2
        self.need(fits, conv, "depthwise convolutions of odd squares, padded by half of them")
        return self._depthwise_weights(conv, size, weight, bias)

    def _depthwise_weights(
        self, conv: nn.Conv2d, size: int, weight: Tensor, bias: Tensor
    ) -> tuple[int, int, int]:
        channels = conv.out_channels
        self.need(conv.groups == channels == conv.in_channels, conv, "depthwise convolutions, or dense ones,")
        offset = self.pack.depthwise(weight, bias, padded_slots(channels))
        return size, offset, offset + size * size * padded(channels)

    def depthwise_conv(self, x: Map, conv: nn.Conv2d, weight: Tensor, bias: Tensor, **options: Any) -> Map:
        """Add a depthwise convolution, folded to this weight and bias."""
        size, stride, padding = self.sizes(conv, MOST_DEPTHWISE)
        self.need(size > 0, conv, "depthwise convolutions of squares, padded by half of them or less")
        places = self._depthwise_weights(conv, size, weight, bias)
        return self.depthwise(x, *places, stride=stride, padding=padding, **options)

    def depthwise(
        self,
        x: Map,
        size: int,
        taps: int,
        bias: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        activation: str | None = None,
        slopes: Slopes = NO_SLOPES,
        mixed: bool = False,
        sums: int = 0,
        outputs: int | None = None,
    ) -> Map:
        """To as many channels, or to `outputs`, a multiple of the padded ones; padded by half of the size."""
        out, act = self.out(outputs or x.channels, sums), ACTIVATIONS.index(activation)
        padding = size // 2 if padding is None else padding
        numbers = (*x, size, stride, padding, act, *slopes, mixed, taps, bias)
        return self.made("depthwise", steps.Depthwise(out, *numbers))

    def inverted(
        self, x: Map, size: int, taps: int, bias: int, expand: Linear, project: Linear, sums: int = 0
    ) -> Map:
        """Depthwise (size 0: none), pointwise, GELU, pointwise, and x."""
        out = self.out(x.channels, sums)
        return self.made("inverted", steps.Inverted(out, x.number, size, taps, bias, expand, project))

    def attention(
        self, x: Map, channels: int, depth: int, *, heads: int = 1, gating: str, outside: bool = False
    ) -> Map:
        """Of so many channels and a depth of each head; these channels are padded if there are several."""
        out = self.out(channels if heads == 1 else heads * padded(channels))
        numbers = (x.number, heads, depth, channels, GATINGS.index(gating), outside)
        return self.made("attention", steps.Attention(out, *numbers))

    def map_norm(self, x: Map, norm: nn.LayerNorm) -> Map:
        """Add a layer norm of each pixel."""
        gamma, beta = (self.pack.add(padded_rows(values)) for values in (norm.weight, norm.bias))
        return self.made(
            "map_norm", steps.MapNorm(self.out(x.channels), x.number, gamma, beta, _bits(norm.eps))
        )

    def weigh(self, x: Map, stride: int, bridges: Bridges) -> Map:
        """Add the weights of the tokens at each position, from what `bridges` gathers with."""
        twice = 2 if self.pack.formats.dtype == torch.bfloat16 else 1  # its numbers are float32 all the same
        out = self.out(padded(bridges.tokens) * twice)
        numbers = (stride, bridges.heads, bridges.tokens, bridges.row, bridges.gather)
        return self.made("weigh", steps.Weigh(out, *x, *numbers))

    def summed(self, x: Map) -> Map:
        """Return the same map, whose sums are kept for the next steps."""
        return self.made("add", steps.Add(self.out(x.channels, 1), x.number, x.number, 1, 0))

    def spread(self, x: Map, mlp: nn.Linear, values: int, row: int, bridges: Bridges | None) -> Map:
        """Add what `mlp`, from tokens to positions, makes of the tokens' values to each position.

        The values lie at this place in the state, and so many floats apart.
        """
        weights, bias = self.pack.add(mlp.weight), self.pack.add(mlp.bias)
        numbers = (x.number, mlp.in_features, values, row, mlp.out_features, weights, bias)
        return self.made("spread", steps.Spread(self.out(x.channels, 0, bridges), *numbers))

    def split(self, x: Map, window: int) -> Map:
        return self.made("split", steps.Windows(self.out(x.channels), x.number, window))

    def join(self, x: Map, window: int, sums: int = 0) -> Map:
        return self.made("join", steps.Windows(self.out(x.channels, sums), x.number, window))

    def add(
        self,
        x: Map,
        other: Map,
        bridges: Bridges | None = None,
        *,
        maximum: bool = False,
        activation: str | None = None,
        sums: int = 0,
    ) -> Map:
        """Or the larger of both; and then an activation."""
        numbers = (x.number, other.number, maximum, ACTIVATIONS.index(activation))
        return self.made("add", steps.Add(self.out(x.channels, sums, bridges), *numbers))

    def max_pool(self, x: Map, pool: nn.MaxPool2d) -> Map:
        sizes = self.sizes(pool, MOST_SIZE)
        dilation: Any = pool.dilation
        plain = dilation in (1, (1, 1)) and not pool.ceil_mode and not pool.return_indices
        fits = plain and sizes[0] > 0
        self.need(fits, pool, f"poolings of squares up to {MOST_SIZE}x{MOST_SIZE}, rounded down")
        return self.made("max_pool", steps.MaxPool(self.out(x.channels), x.number, *sizes))

    def resize(
        self, x: Map, like: Map | str, resampling: str = "nearest", *, added: Map | None = None
    ) -> Map:
        """Add a map in another size: that of a map, or one of `steps.SIZES`; and another map of this size."""
        size = like.number if isinstance(like, Map) else SIZES[like]
        other = -1 if added is None else added.number
        numbers = (x.number, size, other, RESAMPLINGS.index(resampling))
        return self.made("resize", steps.Resize(self.out(x.channels), *numbers))

    def state_rows(self, source: int, rows: int, channels: int) -> Map:
        """Add a map of one column: rows of the state, which lie together."""
        numbers = (-1, source, rows, padded(channels))
        return self.made("state_rows", steps.StateRows(self.out(channels), *numbers))

    def dynamic_lite(
        self, x: Map, hidden: int, taps: int, slopes: int, project: Linear, bridges: Bridges
    ) -> Map:
        """Depthwise to `hidden` channels, dynamic ReLU, pointwise, and x."""
        out = self.out(x.channels, 0, bridges)
        return self.made("dynamic_lite", steps.DynamicLite(out, *x, hidden, taps, slopes, project))

    # --- steps that write numbers of the state -----------------------------------------------------------

    def copy_weights(self, values: Tensor, target: int) -> None:
        self._step("copy", steps.Copy(1, self.pack.add(values), values.numel(), target))

    def copy(self, source: int, count: int, target: int) -> None:
        self._step("copy", steps.Copy(0, source, count, target))

    def linear(
        self,
        rows: int,
        source: int,
        linear: Linear,
        target: int,
        *,
        activation: str | None = None,
        added: bool = False,
        stride: int | None = None,
    ) -> None:
        """Of rows that lie together, each padded; those of the target may lie `stride` floats apart."""
        numbers = (rows, source, padded(linear.inputs), target, stride or linear.outputs)
        self._step("linear", steps.LinearStep(*numbers, ACTIVATIONS.index(activation), added, linear))

    def norm(self, rows: int, norm: nn.LayerNorm, source: int, target: int) -> None:
        (width,) = norm.normalized_shape
        gamma = self.pack.add(torch.cat([padded_rows(norm.weight), padded_rows(norm.bias)]))
        self._step("norm", steps.Norm(rows, width, source, target, gamma, _bits(norm.eps)))

    def attend(
        self, rows: int, heads: int, width: int, places: tuple[int, int, int], stride: int, target: int
    ) -> None:
        """`places` of queries, keys and values; rows of the target lie together."""
        depth = width // heads
        self._step("attend", steps.Attend(rows, heads, depth, *places, stride, target, padded(width)))

    def combine(self, tokens: int, channels: int, heads: int, target: int) -> None:
        """Store what the last map's step has gathered, (tokens, padded channels)."""
        self._step("combine", steps.Combine(tokens, channels, heads, target))

    def gate(self, rows: int, channels: int, at: int, at_stride: int, gates: int, stride: int) -> None:
        self._step("gate", steps.Gate(rows, channels, at, at_stride, gates, stride))

    def slopes(
        self, rows: int, source: int, stride: int, functions: int, linear: Linear, target: int
    ) -> None:
        self._step("slopes", steps.Slopes(rows, source, stride, target, functions, linear))

    def kernels(self, *fields: Any) -> None:
        self._step("kernels", steps.Kernels(*fields))

    def mix(self, attention: int, count: int, values: Sequence[Tensor], matrix: bool) -> int:
        """values[0] and the others times what is at `attention`; the place of the result."""
        offset, blocks = self.pack.mixed(values)
        place = self.place(16 * blocks)
        self._step("mix", steps.Mix(attention, count, blocks, offset, place, matrix))
        return place

    def affine(self, norm: str, gamma: Tensor, beta: Tensor, eps: float) -> int:
        """Add a norm of the last map, and return the place of its factors and summands."""
        channels = gamma.numel()
        place = self.place(2 * padded(channels))
        factor, summand = self.pack.add(gamma.flatten()), self.pack.add(beta.flatten())
        self._step("affine", steps.Affine(NORMS.index(norm), channels, factor, summand, _bits(eps), place))
        return place

    def pool(self, channels: int, place: int) -> None:
        """Means of the last map."""
        self._step("pool", steps.Pool(channels, place))

    def pooled(self, x: Map, linear: Linear, target: int, slopes: int = -1) -> None:
        self._step("pooled", steps.Pooled(*x, target, slopes, linear))

    def collect(self, x: Map, mlp: nn.Linear, target: int, *, added: bool = False) -> None:
        """Store what `mlp`, from positions to tokens, makes of a map, (tokens, padded channels)."""
        tokens, positions = mlp.weight.shape
        weights = nn.functional.pad(mlp.weight.detach().t(), (0, -tokens % 4))
        numbers = (added, positions, self.pack.add(weights), self.pack.add(mlp.bias))
        self._step("collect", steps.Collect(*x, tokens, target, *numbers))

    def turn(
        self, rows: int, columns: int, source: int, stride: int, target: int, *, added: bool = False
    ) -> None:
        """Store the columns of these rows as rows, (columns, padded rows)."""
        self._step("turn", steps.Turn(rows, columns, source, stride, target, added))

    # --- a step that writes neither ----------------------------------------------------------------------

    def hand_out(self, x: Map) -> None:
        """Hand out a map that is a result, or keep it where something follows."""
        if self.keeps:
            self.kept.append(x)
            return
        self._step("hand_out", steps.HandOut(*x))

    def finished(
        self,
        features: int,
        linears: Sequence[tuple[Linear, str | None]],
        names: Sequence[str],
        in_channels: int,
        classes: int,
    ) -> Deployed:
        """Return the network.

        Args:
            features: the place of the inputs of the first linear layer.
            linears: (as `Packer.linear` gives it, activation) of all; what they give is the result.
            names: of their parts.
        """
        layers = [steps.Layer(ACTIVATIONS.index(act), linear) for linear, act in linears]
        plan = [*self._header(in_channels, features, len(layers)), *steps.numbers(layers), *self.steps]
        options = self._options(in_channels, [*self.parts, *names])
        return Deployed(self.pack.tensor(), plan, classes=classes, **options)

    def finished_pyramid(
        self, wanted: Wanted | ChainMaps, in_channels: int, margins: Sequence[int] | None = None
    ) -> Any:
        """Return the network whose results are the maps that were handed out, or what is made of them.

        `margins` are those of `Result`, of the maps in the order of the network.
        """
        stages = wanted.stages
        rounded_up = [stage.reduction - 1 for stage in stages]
        margins = rounded_up if margins is None else list(margins)
        following = wanted.following if isinstance(wanted, Wanted) else None
        if following is None:
            results = [
                Result(stage.channels, stage.reduction, margin)
                for stage, margin in zip(stages, margins, strict=True)
            ]
            return self.finished_maps(DeployedPyramid, in_channels, wanted, results)
        if margins != rounded_up:
            raise ValueError("deploy: detectors over maps whose sizes are not rounded up cannot be deployed")
        self.keeps, ordered = False, sorted(wanted.order)
        maps = list(self.kept)
        return following(self, [maps[ordered.index(i)] for i in wanted.order])

    def finished_maps(self, kind: Any, in_channels: int, *arguments: Any) -> Any:
        """Return the network, of a class of `DeployedMaps`, whose results were handed out."""
        plan = [*self._header(in_channels, 0, 0), *self.steps]
        options = self._options(in_channels, self.parts)
        return kind(*arguments, self.pack.tensor(), plan, **options)

    def _options(self, in_channels: int, parts: list[str]) -> dict[str, Any]:
        return dict(formats=self.pack.formats, in_channels=in_channels, parts=parts)

    def _header(self, in_channels: int, features: int, linears: int) -> steps.Header:
        count = len(self.parts)
        if count > MOST_STEPS:
            raise ValueError(f"deploy: at most {MOST_STEPS} steps can be deployed, got {count}")
        bf16 = int(self.pack.formats.dtype == torch.bfloat16)
        weights = self.pack.formats.weights
        narrow = 0 if weights is None else weights.itemsize
        int8 = int(self.pack.formats.rounding is not None)
        counts = (self.maps, self.state, features, linears, count)
        return steps.Header(self.pack.size, bf16, narrow, int8, in_channels, *counts)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return bits

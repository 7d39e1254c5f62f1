"""A network as a chain of steps for the kernels in csrc/cpu/deployed_chain.h, whose fields it writes in their
order."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .deployed import Deployed
from .packing import padded, padded_rows, padded_slots
from .planner import Planner
from .pyramid import DeployedPyramid, Wanted

(
    _IMAGE_CONV, _DENSE_CONV, _POINTWISE, _DEPTHWISE, _INVERTED, _ATTENTION, _SPLIT, _JOIN,
    _TOKENS, _KERNELS, _MIX, _AFFINE, _POOL, _HAND_OUT,
) = range(14)  # fmt: skip
NO_LINEAR = [0, 0, 0, 0]
MOST_STEPS, MOST_SIZE = 1024, 16  # of a chain; of a dense convolution's kernel, less one
ACTIVATIONS = {None: 0, "gelu": 1, "hardswish": 2}


class Map(NamedTuple):
    """A feature map: the number of its memory, and its channels."""

    number: int
    channels: int


class Gather(NamedTuple):
    """A Mobile -> Former that reads a map: heads, tokens, and the place of the queries."""

    heads: int
    tokens: int
    queries: int


def bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


class Chain(Planner):
    """A plan in the making. Steps that make a map return it, in memory that no living map has."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.steps: list[int] = []
        self.parts: list[str] = []
        self.part = ""
        self.living: set[int] = set()
        self.maps = self.state = 0

    @contextmanager
    def named(self, part: str) -> Iterator[None]:
        """Steps within belong to this part."""
        before, self.part = self.part, part
        yield
        self.part = before

    def place(self, floats: int) -> int:
        """Of so many floats in the state."""
        place = self.state
        self.state += padded(floats)
        return place

    def free(self, used: Map) -> None:
        self.living.remove(used.number)

    def replaced(self, old: Map, new: Map) -> Map:
        """`new`, after which nobody reads `old`."""
        self.free(old)
        return new

    def _step(self, kind: int, *fields: int) -> None:
        self.parts.append(self.part)
        self.steps += [kind, len(fields), *fields]

    def _made(
        self, kind: int, channels: int, fields: Sequence[int], sums: int = 0, gather: Gather | None = None
    ) -> Map:
        number = next(i for i in range(len(self.living) + 1) if i not in self.living)
        self.living.add(number)
        self.maps = max(self.maps, number + 1)
        read = (0, 0, 0) if gather is None else gather
        self._step(kind, number, channels, sums, *read, *fields)
        return Map(number, channels)

    # --- steps that make a map ---------------------------------------------------------------------------

    def dense(self, x: Map | None, conv: nn.Conv2d, weight: Tensor, bias: Tensor, gelu: bool) -> Map:
        """A dense convolution, folded to this weight and bias; of the image where x is None."""
        outputs, inputs, size, _ = weight.shape
        fits = conv.groups == 1 and conv.kernel_size == (size, size) and size % 2 == 1 and size < MOST_SIZE
        fits = fits and conv.padding == (size // 2, size // 2) and conv.stride in ((1, 1), (2, 2))
        self.need(fits, conv, "dense convolutions of odd squares, padded by half of them, of stride 1 or 2")
        if x is None:
            linear = self.pack.linear(weight.flatten(1), bias, runs=inputs * size)
        else:
            linear = self.pack.linear(weight.permute(0, 2, 3, 1).flatten(1), bias)
        kind, number = (_IMAGE_CONV, -1) if x is None else (_DENSE_CONV, x.number)
        return self._made(kind, outputs, [number, inputs, size, conv.stride[0], int(gelu), *linear])

    def pointwise(
        self,
        x: Map,
        outputs: int,
        linear: Sequence[int],
        *,
        groups: int = 1,
        gelu: bool = False,
        mixed: bool = False,
        added: Map | None = None,
        affine: int = -1,
        affine_gelu: bool = False,
        sums: int = 0,
        gather: Gather | None = None,
    ) -> Map:
        """A 1x1 convolution; `linear` as `Packer.linear` gives it."""
        other = -1 if added is None else added.number
        fields = [x.number, x.channels, affine, affine_gelu, other, groups, gelu, mixed, *linear]
        return self._made(_POINTWISE, outputs, [int(field) for field in fields], sums, gather)

    def depthwise_weights(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> tuple[int, int, int]:
        """Of a depthwise convolution, folded to this weight and bias: its size, where taps and biases are."""
        size, channels = conv.kernel_size[0], conv.out_channels
        fits = size in (3, 5, 7) and conv.groups == channels == conv.in_channels
        fits = fits and conv.padding == (size // 2, size // 2)
        self.need(fits, conv, "depthwise convolutions of 3x3, 5x5 or 7x7")
        self.need(
            conv.stride == (1, 1) or (conv.stride == (2, 2) and size == 3),
            conv,
            "depthwise convolutions of stride 1, and of stride 2 those of 3x3",
        )
        offset = self.pack.depthwise(weight, bias, padded_slots(channels))
        return size, offset, offset + size * size * padded(channels)

    def depthwise(
        self,
        x: Map,
        size: int,
        taps: int,
        bias: int,
        *,
        stride: int = 1,
        gelu: bool = False,
        mixed: bool = False,
        sums: int = 0,
    ) -> Map:
        fields = [x.number, size, stride, int(gelu), int(mixed), taps, bias]
        return self._made(_DEPTHWISE, x.channels, fields, sums)

    def inverted(
        self,
        x: Map,
        size: int,
        taps: int,
        bias: int,
        expand: Sequence[int],
        project: Sequence[int],
        sums: int = 0,
    ) -> Map:
        """Depthwise (size 0: none), pointwise, GELU, pointwise, and x."""
        return self._made(_INVERTED, x.channels, [x.number, size, taps, bias, *expand, *project], sums)

    def attention(self, x: Map, channels: int, depth: int, outside: bool) -> Map:
        return self._made(_ATTENTION, channels, [x.number, depth, int(outside)])

    def split(self, x: Map, window: int) -> Map:
        return self._made(_SPLIT, x.channels, [x.number, window])

    def join(self, x: Map, window: int, sums: int = 0) -> Map:
        return self._made(_JOIN, x.channels, [x.number, window], sums)

    # --- steps that make numbers of the state ------------------------------------------------------------

    def tokens(self, *fields: int) -> None:
        self._step(_TOKENS, *fields)

    def kernels(self, *fields: int) -> None:
        self._step(_KERNELS, *fields)

    def mix(self, attention: int, count: int, values: Sequence[Tensor], matrix: bool) -> int:
        """values[0] and the others times what is at `attention`; the place of the result."""
        offset, blocks = self.pack.mixed(values)
        place = self.place(16 * blocks)
        self._step(_MIX, attention, count, blocks, offset, place, int(matrix))
        return place

    def affine(self, norm: int, gamma: Tensor, beta: Tensor, eps: float) -> int:
        """A norm of the last map; the place of its factors and summands."""
        channels = gamma.numel()
        place = self.place(2 * padded(channels))
        fields = [self.pack.add(values.flatten()) for values in (gamma, beta)]
        self._step(_AFFINE, norm, channels, *fields, bits(eps), place)
        return place

    def pool(self, channels: int, place: int) -> None:
        """Means of the last map."""
        self._step(_POOL, channels, place)

    # --- steps that make neither -------------------------------------------------------------------------

    def hand_out(self, x: Map) -> None:
        """A map that is a result."""
        self._step(_HAND_OUT, *x)

    def norm(self, norm: nn.LayerNorm) -> int:
        self.need(norm.eps == 1e-5, norm, "layer norms with eps 1e-5")
        return self.pack.add(torch.cat([padded_rows(norm.weight), padded_rows(norm.bias)]))

    def finished(
        self,
        features: int,
        linears: Sequence[tuple[list[int], str | None]],
        names: Sequence[str],
        in_channels: int,
        classes: int,
    ) -> Deployed:
        """The network.

        Args:
            features: the place of the inputs of the first linear layer.
            linears: (as `Packer.linear` gives it, activation) of all; what they give is the result.
            names: of their parts.
        """
        layers = [number for linear, act in linears for number in (ACTIVATIONS[act], *linear)]
        plan = [*self._header(in_channels, features, len(linears)), *layers, *self.steps]
        options: dict[str, Any] = dict(
            dtype=self.pack.dtype, in_channels=in_channels, parts=[*self.parts, *names]
        )
        return Deployed("deployed_chain", self.pack.tensor(), plan, classes=classes, **options)

    def finished_pyramid(self, wanted: Wanted, in_channels: int) -> DeployedPyramid:
        """The network whose results are the maps that were handed out."""
        plan = [*self._header(in_channels, 0, 0), *self.steps]
        options: dict[str, Any] = dict(dtype=self.pack.dtype, in_channels=in_channels, parts=self.parts)
        return DeployedPyramid(wanted, "deployed_chain", self.pack.tensor(), plan, **options)

    def _header(self, in_channels: int, features: int, linears: int) -> list[int]:
        count = len(self.parts)
        if count > MOST_STEPS:
            raise ValueError(f"deploy: at most {MOST_STEPS} steps can be deployed, got {count}")
        bf16 = int(self.pack.dtype == torch.bfloat16)
        return [self.pack.size, bf16, in_channels, self.maps, self.state, features, linears, count]

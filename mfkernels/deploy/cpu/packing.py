"""Weights as the deployed kernels read them: one tensor, and offsets into it."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import _C
from ...nn.conv_bn import affine
from .steps import Linear

LANES = 16  # channels are padded to a multiple of this, and so many outputs of a packed matrix lie together


def padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


class Rounding(NamedTuple):
    """Say how the inputs x of a product become bytes: x * scale + zero, rounded, from 0 to 255."""

    scale: float  # a float32
    zero: int


class Formats(NamedTuple):
    """Say how a network's weights are stored, and with which inputs it multiplies them.

    Args:
        dtype: of maps and matrices, float32 or bfloat16; all else is float32.
        weights: of the matrices of linear layers over rows, where they are narrower.
        rounding: None, or how products over maps round their inputs, by their numbers, which begin with 1.
            The weights of these are int8; products that are not there can be calibrated.
    """

    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None
    rounding: Mapping[int, Rounding] | None = None


class Packer:
    """Gathers tensors; each begins at a multiple of 16 floats. Offsets count floats.

    Args:
        formats: of the weights.
    """

    def __init__(self, formats: Formats) -> None:
        self.formats = formats
        self.products = 0  # over maps
        self._parts: list[Tensor] = []
        self.size = 0

    def add(self, values: Tensor) -> int:
        """Return the offset of these values, flattened.

        Two of bfloat16, or four of int8, share the place of a float.
        """
        flat = values.detach().flatten()
        flat = flat.view(torch.float32) if flat.dtype in (torch.bfloat16, torch.int8) else flat.float()
        offset = self.size
        self.size += padded(flat.numel())
        self._parts.append(nn.functional.pad(flat, (0, self.size - offset - flat.numel())))
        return offset

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        runs: int = 1,
        groups: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        """Pack a matrix (outputs, inputs) and its bias.

        Panels of 16 outputs, in each the outputs of an input side by side. In bfloat16 inputs go in pairs,
        and both of an output share the place of a float.

        Args:
            runs: of inputs that lie apart in memory; a pair does not reach from one to the next.
            groups: of a convolution, whose weight is (outputs, inputs / groups); where there are several, a
                panel has the inputs of its outputs' groups alone, of each run those in it.
            dtype: another than that of the other matrices.
        """
        outputs, inputs = len(weight), weight.shape[1] * groups
        values = self.matrix(weight, runs=runs, groups=groups, dtype=dtype)
        biases = torch.zeros(padded(outputs), dtype=torch.float64)
        if bias is not None:
            biases[:outputs] = bias.detach()
        return Linear(inputs, padded(outputs), self.add(values), self.add(biases))

    def map_linear(
        self, weight: Tensor, bias: Tensor | None = None, *, runs: int = 1, groups: int = 1
    ) -> Linear:
        """Pack the same of a product over a map, whose matrix may be int8.

        Then four inputs of an output share the place of a float, and each panel ends with the integers that
        sums begin with, which take away what `zero` adds, and the factors of the sums.
        """
        self.products += 1
        if self.formats.rounding is None:
            return self.linear(weight, bias, runs=runs, groups=groups)
        rounding = self.formats.rounding.get(self.products)
        if rounding is None:
            return self.linear(weight, bias, runs=runs, groups=groups)._replace(zero=self.products)
        full = dense(weight.detach().double(), groups, runs)
        values, factors = narrowed(full, torch.int8)
        panels: list[Tensor] = []
        for rows, panel in self._panels(values, groups, runs):
            sums = -rounding.zero * panel.int().sum(1)
            last = torch.stack([sums.int(), (factors[rows] / rounding.scale).float().view(torch.int32)])
            fours = _together(_wide(panel.t()).reshape(runs, -1, LANES), 4)
            panels += [fours.flatten(), _wide(last).flatten().view(torch.int8)]
        outputs, inputs = full.shape
        biases = torch.zeros(padded(outputs), dtype=torch.float64)
        if bias is not None:
            biases[:outputs] = bias.detach()
        offsets = self.add(torch.cat(panels)), self.add(biases)
        return Linear(inputs, padded(outputs), *offsets, bits_of_float(rounding.scale), rounding.zero)

    def _panels(self, matrix: Tensor, groups: int, runs: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield 16 rows after the other of a matrix, and these: of several groups the inputs of theirs."""
        outputs, inputs = matrix.shape
        for o in range(0, outputs, LANES):
            place = slice(o, min(o + LANES, outputs))
            rows = matrix[place]
            if groups > 1:
                first, last = (i * groups // outputs for i in (place.start, place.stop - 1))
                of_run = inputs // runs
                rows = rows.unflatten(1, (runs, of_run))
                rows = rows[..., first * of_run // groups : (last + 1) * of_run // groups].flatten(1)
            yield place, rows

    def row_linear(self, weight: Tensor, bias: Tensor | None = None, factor: Tensor | float = 1.0) -> Linear:
        """Pack a matrix times a factor (of each output), and its bias, of a layer over tokens or means.

        Where weights are narrow, they are rounded without the factor, which lies behind the bias.
        """
        outputs, inputs = weight.shape
        factors = torch.as_tensor(factor, dtype=torch.float64).detach().expand(outputs)
        weight = weight.detach().double()
        if self.formats.weights is None:
            return self.linear(weight * factors[:, None], bias)
        values, scales = narrowed(weight, self.formats.weights)
        width = padded(outputs)
        panels = nn.functional.pad(values.t(), (0, width - outputs)).view(inputs, -1, LANES).transpose(0, 1)
        last = torch.zeros(2, width, dtype=torch.float64)
        if bias is not None:
            last[0, :outputs] = bias.detach()
        last[1, :outputs] = scales * factors
        return Linear(inputs, width, self.add(panels), self.add(last))

    def matrix(
        self, weight: Tensor, *, runs: int = 1, groups: int = 1, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the values of `linear` in their order and stored dtype, not added yet."""
        dtype, panels = dtype or self.formats.dtype, []
        for _, rows in self._panels(dense(weight.detach().double(), groups, runs), groups, runs):
            columns = _wide(rows.t())
            if dtype == torch.bfloat16:
                columns = _together(columns.reshape(runs, -1, columns.shape[1]), 2)
            panels.append(columns.flatten())
        return torch.cat(panels).to(dtype)

    def mixed(self, kernels: Sequence[Tensor]) -> tuple[int, int]:
        """Pack values of several kernels, the first 16 of each, then the next.

        Return their offset, and how many blocks of 16 one kernel has.
        """
        values = torch.stack([kernel.view(-1, LANES) for kernel in kernels], 1)
        return self.add(values), len(values)

    def depthwise(self, weight: Tensor, bias: Tensor, slots: Sequence[int]) -> int:
        """Pack kernels (channels, 1, k, k) as (k, k, slots), then the bias.

        Slot i takes channel slots[i], none where that is -1.
        """
        return self.add(torch.cat([taps(weight, slots), spread(bias.detach().double(), slots)]))

    def tensor(self) -> Tensor:
        weights = torch.empty(self.size, dtype=torch.float32)
        _C.advise_huge_pages(weights.data_ptr(), 4 * self.size)
        return weights.copy_(torch.cat(self._parts))


def narrowed(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values of this dtype, and a factor of each row: their product is `weight`, rounded.

    Factors of bfloat16 are ones; those of int8 make the largest value of a row 127 or -127.
    """
    if dtype == torch.bfloat16:
        return weight.bfloat16(), weight.new_ones(len(weight))
    factors = weight.abs().amax(1) / 127
    factors = torch.where(factors > 0, factors, 1.0)
    return (weight / factors[:, None]).round().to(torch.int8), factors


def taps(weight: Tensor, slots: Sequence[int]) -> Tensor:
    """(channels, 1, k, k) as (k, k, slots), flattened."""
    return spread(weight.detach().double().flatten(1), slots).t().flatten()


def _together(rows: Tensor, count: int) -> Tensor:
    """Turn (runs, inputs, outputs) into (blocks of so many inputs, outputs, inputs of a block)."""
    _, inputs, outputs = rows.shape
    whole = nn.functional.pad(rows, (0, 0, 0, -inputs % count))
    return whole.view(-1, count, outputs).transpose(1, 2)


def _wide(rows: Tensor) -> Tensor:
    """Each row with zeros up to the outputs of a panel."""
    return nn.functional.pad(rows, (0, padded(rows.shape[-1]) - rows.shape[-1]))


def bits_of_float(value: float) -> int:
    (bits,) = struct.unpack("i", struct.pack("f", value))
    return bits


def padded_slots(inputs: int, numbers: Sequence[int] | None = None) -> list[int]:
    """`numbers` (or all inputs), by groups of `inputs`, with -1 where channels are padded."""
    numbers = range(inputs) if numbers is None else numbers
    gap = [-1] * (padded(inputs) - inputs)
    groups = [numbers[i : i + inputs] for i in range(0, len(numbers), inputs)]
    return [slot for group in groups for slot in (*group, *gap)]


def spread(values: Tensor, slots: Sequence[int]) -> Tensor:
    """Row i is row slots[i] of `values`, zero where that is -1."""
    index = torch.tensor(slots)
    rows = values[index.clamp(min=0)]
    return rows * (index >= 0).to(rows).view(-1, *[1] * (rows.dim() - 1))


def padded_rows(rows: Tensor) -> Tensor:
    """Each row, or the only one, with zeros at its end."""
    return nn.functional.pad(rows.detach(), (0, padded(rows.shape[-1]) - rows.shape[-1]))


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the convolution that does the work of both."""
    scale, shift = affine(norm)
    weight = conv.weight.detach().double() * scale.view(-1, 1, 1, 1)
    return weight, shift if conv.bias is None else shift + scale * conv.bias.detach().double()


def dense(weight: Tensor, groups: int, runs: int = 1) -> Tensor:
    """Return the (outputs, inputs) matrix of a grouped convolution, whose inputs are so many runs."""
    if groups == 1:
        return weight.flatten(1)
    of_runs = weight.flatten(1).unflatten(1, (runs, -1)).unbind(1)
    return torch.stack([torch.block_diag(*run.chunk(groups)) for run in of_runs], 1).flatten(1)


def shuffled(shuffle: nn.Module, channels: int) -> list[int]:
    """Which input channel each output channel of a shuffle (or of an identity) is."""
    numbers = torch.arange(channels, dtype=torch.float32).view(1, channels, 1, 1)
    return [int(n) for n in shuffle(numbers).flatten()]

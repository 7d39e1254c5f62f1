"""Weights as the deployed kernels read them: one tensor, and offsets into it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _C
from ..nn.conv_bn import affine
from .steps import Linear

LANES = 16  # channels are padded to a multiple of this, and so many outputs of a packed matrix lie together


def padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


class Packer:
    """Gathers tensors; each begins at a multiple of 16 floats. Offsets count floats.

    Args:
        dtype: of the matrices; all else is float32.
        weights: of the matrices of linear layers over rows, where they are narrower.
    """

    def __init__(self, dtype: torch.dtype, weights: torch.dtype | None = None) -> None:
        self.dtype, self.weights = dtype, weights
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
                panel has the inputs of its outputs' groups alone.
            dtype: another than that of the other matrices.
        """
        outputs, inputs = len(weight), weight.shape[1] * groups
        values = self.matrix(weight, runs=runs, groups=groups, dtype=dtype)
        biases = torch.zeros(padded(outputs), dtype=torch.float64)
        if bias is not None:
            biases[:outputs] = bias.detach()
        return Linear(inputs, padded(outputs), self.add(values), self.add(biases))

    def row_linear(self, weight: Tensor, bias: Tensor | None = None, factor: Tensor | float = 1.0) -> Linear:
        """Pack a matrix times a factor (of each output), and its bias, of a layer over tokens or means.

        Where weights are narrow, they are rounded without the factor, which lies behind the bias.
        """
        outputs, inputs = weight.shape
        factors = torch.as_tensor(factor, dtype=torch.float64).detach().expand(outputs)
        weight = weight.detach().double()
        if self.weights is None:
            return self.linear(weight * factors[:, None], bias)
        values, scales = narrowed(weight, self.weights)
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
        dtype, panels = dtype or self.dtype, []
        full = dense(weight.detach().double(), groups)
        outputs, inputs = full.shape
        for o in range(0, outputs, LANES):
            rows = full[o : o + LANES]
            if groups > 1:
                first, last = (i * groups // outputs for i in (o, min(o + LANES, outputs) - 1))
                rows = rows[:, first * inputs // groups : (last + 1) * inputs // groups]
            columns = nn.functional.pad(rows.t(), (0, padded(len(rows)) - len(rows)))
            panels.append(
                _in_pairs(columns.view(runs, -1, columns.shape[1])) if dtype == torch.bfloat16 else columns
            )
        return torch.cat([panel.flatten() for panel in panels]).to(dtype)

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


def _in_pairs(rows: Tensor) -> Tensor:
    """Turn (runs, inputs, outputs) into (pairs, outputs, 2), in bfloat16."""
    _, inputs, outputs = rows.shape
    even = nn.functional.pad(rows, (0, 0, 0, inputs % 2)).bfloat16()
    return even.view(-1, 2, outputs).transpose(1, 2)


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


def dense(weight: Tensor, groups: int) -> Tensor:
    """Return the (outputs, inputs) matrix of a grouped 1x1 convolution."""
    blocks = weight.flatten(1).chunk(groups)
    return torch.block_diag(*blocks)


def shuffled(shuffle: nn.Module, channels: int) -> list[int]:
    """Which input channel each output channel of a shuffle (or of an identity) is."""
    numbers = torch.arange(channels, dtype=torch.float32).view(1, channels, 1, 1)
    return [int(n) for n in shuffle(numbers).flatten()]

"""Weights as the deployed kernels read them: one tensor, and offsets into it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _C
from ..nn.conv_bn import affine

LANES = 16  # channels are padded to a multiple of this
PANEL = 32  # outputs of a packed matrix that lie together


def padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


class Packer:
    """Gathers tensors; each begins at a multiple of 16 floats. Offsets count floats.

    Args:
        dtype: of the matrices; all else is float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts: list[Tensor] = []
        self.size = 0

    def add(self, values: Tensor) -> int:
        """Returns the offset of these values, flattened."""
        flat = values.detach().float().flatten()
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
        dtype: torch.dtype | None = None,
    ) -> list[int]:
        """A matrix (outputs, inputs) and its bias, as a PlanLinear: inputs, padded outputs, two offsets.

        Panels of 32 outputs (the last may have 16), in each the outputs of an input side by side. In
        bfloat16 inputs go in pairs, and both of an output share the place of a float.

        Args:
            runs: of inputs that lie apart in memory; a pair does not reach from one to the next.
            dtype: another than that of the other matrices.
        """
        outputs, inputs = weight.shape
        columns = torch.zeros(inputs, padded(outputs), dtype=torch.float64)
        columns[:, :outputs] = weight.detach().t()
        if (dtype or self.dtype) == torch.bfloat16:
            columns = _in_pairs(columns.view(runs, -1, columns.shape[1]))
        panels = [columns[:, o : o + PANEL].flatten() for o in range(0, columns.shape[1], PANEL)]
        biases = torch.zeros(columns.shape[1], dtype=torch.float64)
        if bias is not None:
            biases[:outputs] = bias.detach()
        offset = self.add(torch.cat(panels) if panels else columns)
        return [inputs, columns.shape[1], offset, self.add(biases)]

    def depthwise(self, weight: Tensor, bias: Tensor, slots: Sequence[int]) -> int:
        """3x3 kernels (channels, 1, 3, 3): (3, 3, slots), then the bias; slot i takes channel slots[i], none
        where that is -1."""
        taps = spread(weight.detach().double().flatten(1), slots).t()
        return self.add(torch.cat([taps.flatten(), spread(bias.detach().double(), slots)]))

    def tensor(self) -> Tensor:
        weights = torch.empty(self.size, dtype=torch.float32)
        _C.advise_huge_pages(weights.data_ptr(), 4 * self.size)
        return weights.copy_(torch.cat(self._parts))


def _in_pairs(rows: Tensor) -> Tensor:
    """(runs, inputs, outputs) to (pairs, outputs): pairs of bfloat16 in the bits of a float32."""
    _, inputs, outputs = rows.shape
    even = nn.functional.pad(rows, (0, 0, 0, inputs % 2)).bfloat16()
    return even.view(-1, 2, outputs).transpose(1, 2).contiguous().view(torch.float32).squeeze(2)


def spread(values: Tensor, slots: Sequence[int]) -> Tensor:
    """Row i is row slots[i] of `values`, zero where that is -1."""
    index = torch.tensor(slots)
    rows = values[index.clamp(min=0)]
    return rows * (index >= 0).to(rows).view(-1, *[1] * (rows.dim() - 1))


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the convolution that does the work of both."""
    scale, shift = affine(norm)
    weight = conv.weight.detach().double() * scale.view(-1, 1, 1, 1)
    return weight, shift if conv.bias is None else shift + scale * conv.bias.detach().double()


def dense(weight: Tensor, groups: int) -> Tensor:
    """The (outputs, inputs) matrix of a grouped 1x1 convolution."""
    blocks = weight.flatten(1).chunk(groups)
    return torch.block_diag(*blocks)


def shuffled(shuffle: nn.Module, channels: int) -> list[int]:
    """Which input channel each output channel of a shuffle (or of an identity) is."""
    numbers = torch.arange(channels, dtype=torch.float32).view(1, channels, 1, 1)
    return [int(n) for n in shuffle(numbers).flatten()]

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An unwritten map of x's dtype in x's memory format, as the C++ kernels allocate theirs
    (`empty_map` in csrc/ops/common.h)."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of a map's results."""
    channels_last = not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


def gradients_like(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Unwritten gradients, as backward operators return them: an empty tensor where the input was None,
    since an operator's outputs cannot be."""
    first = next(x for x in inputs if x is not None)
    return [first.new_empty(0 if x is None else x.shape) for x in inputs]


def without_absent(inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """What a backward operator returned, with None where the input was None."""
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]

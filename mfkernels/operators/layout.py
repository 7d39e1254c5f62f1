from collections.abc import Sequence

import torch
from torch import Tensor


def empty_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an unwritten map of x's dtype in x's memory format.

    The C++ kernels allocate their maps so, too (`empty_map` in csrc/ops/common.h).
    """
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format of a map's results."""
    channels_last = not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


def gradients_like(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return unwritten gradients, as backward operators return them.

    A gradient is an empty tensor where the input was None, since an operator's outputs cannot be None.
    """
    first = next(x for x in inputs if x is not None)
    return [first.new_empty(0 if x is None else x.shape) for x in inputs]


def without_absent(inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what a backward operator returned, with None where the input was None."""
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]

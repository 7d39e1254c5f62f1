import torch
from torch import Tensor


def empty_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An unwritten map of x's dtype in x's memory format, as the C++ kernels allocate theirs
    (`empty_map` in csrc/ops/common.h)."""
    channels_last = not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def once(op: str):
    """The autograd formula of a backward operator: there is none, and saying so beats a silent zero."""

    def double_backward(ctx, *grads):
        raise RuntimeError(
            f"{op}: gradients of gradients are not implemented in the kernels; "
            'use mfkernels.use_backend("reference") for them'
        )

    return double_backward

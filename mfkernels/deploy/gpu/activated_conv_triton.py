import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operators.dynamic_conv2d.triton import activated as dynamic_conv
from ...operators.global_response_norm.triton import activated as response_gelu
from ...operators.triton_maps import load_vector, place, power

__all__ = ["dynamic_conv", "response_factors", "response_gelu"]


@triton.jit(do_not_specialize=["parts", "channels"])
def factors_kernel(
    squares, gamma, out, parts, channels, eps, MEAN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    """Compute 1 + gamma norm / (mean + eps), the mean over BC or fewer channels, or without MEAN the norm."""
    block, _, b = place(tl.cdiv(channels, BC), 1)
    c = block * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float64)
    for start in range(0, parts, BS):
        s = start + tl.arange(0, BS)
        at = (b * parts + s)[:, None] * channels + c[None, :]
        inside = (s < parts)[:, None] & (c < channels)[None, :]
        total += tl.sum(tl.load(squares + at, inside, 0.0).to(tl.float64), 0)
    norm = tl.sqrt(total)
    below = norm + eps
    if MEAN:
        below = tl.sum(norm, 0) / channels + eps
    factor = 1 + load_vector(gamma, c, channels, 0.0) * norm / below
    tl.store(out + b * channels + c, factor.to(tl.float32), c < channels)


def response_factors(squares: Tensor, gamma: Tensor, mean: str, eps: float) -> Tensor:
    batch, parts, channels = squares.shape
    out = torch.empty((batch, channels), dtype=torch.float32, device=squares.device)
    if out.numel() == 0:
        return out
    block_c = power(channels) if mean == "channels" else 64
    factors_kernel[(triton.cdiv(channels, block_c) * batch,)](
        squares.contiguous(), gamma.contiguous(), out, parts, channels, eps,
        MEAN=mean == "channels", BS=max(1, min(power(parts), 1024 // block_c)), BC=block_c,
    )  # fmt: skip
    return out

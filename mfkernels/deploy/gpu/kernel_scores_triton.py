import triton
import triton.language as tl
from torch import Tensor

from ...operators.triton_maps import power


@triton.jit
def products(weight, row, inside_row, inner, column, inside, values):
    """Return the weights of these rows and columns, each times its column's value."""
    at = row[:, None] * inner + column[None, :]
    factors = tl.load(weight + at, inside_row[:, None] & inside[None, :], 0.0)
    return factors.to(tl.float32) * values[None, :]


@triton.jit(do_not_specialize=["token_b", "parts", "pixels", "width", "channels", "units", "kernels"])
def scores_kernel(
    sums, token, token_b, weight1, bias1, weight2, out, parts, pixels, width, channels, units, kernels,
    SOFTMAX: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    u, k = tl.arange(0, BH), tl.arange(0, BK)
    inside_u, inside_k = u < units, k < kernels
    inner = width + channels
    total = tl.zeros([BH, BC], tl.float32)
    for start in range(0, width, BC):
        c = start + tl.arange(0, BC)
        value = tl.load(token + b * token_b + c, c < width, 0.0).to(tl.float32)
        total += products(weight1, u, inside_u, inner, c, c < width, value)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        inside_c = c < channels
        value = tl.zeros([BC], tl.float32)
        for first in range(0, parts, BS):
            s = first + tl.arange(0, BS)
            at = (b * parts + s)[:, None] * channels + c[None, :]
            value += tl.sum(
                tl.load(sums + at, (s < parts)[:, None] & inside_c[None, :], 0.0).to(tl.float32), 0
            )
        total += products(weight1, u, inside_u, inner, width + c, inside_c, value / pixels)
    hidden = tl.sum(total, 1) + tl.load(bias1 + u, inside_u, 0.0).to(tl.float32)
    # Not tl.maximum, which loses NaN; beyond the last unit there is NaN, too, where it is in the map.
    hidden = tl.where(inside_u & ~(hidden < 0), hidden, 0.0)
    scores = tl.sum(products(weight2, k, inside_k, units, u, inside_u, hidden), 1)
    if SOFTMAX:
        scores = tl.where(inside_k, scores, float("-inf"))
        scores = tl.exp(scores - tl.max(scores, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = 1 / (1 + tl.exp(-scores))
    tl.store(out + b * kernels + k, scores.to(out.dtype.element_ty), inside_k)


def kernel_scores(
    sums: Tensor,
    pixels: int,
    token: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    softmax: bool,
) -> Tensor:
    batch, parts, channels = sums.shape
    kernels, units = weight2.shape
    out = token.new_empty(batch, kernels)
    if out.numel() == 0:
        return out
    block_u = power(units, 16)
    block_c = power(8192 // block_u, 16, 64)
    sums, weight1, bias1, weight2 = (t.contiguous() for t in (sums, weight1, bias1, weight2))
    token = token if token.stride(1) == 1 else token.contiguous()
    scores_kernel[(batch,)](
        sums, token, token.stride(0), weight1, bias1, weight2, out, parts, pixels,
        token.shape[1], channels, units, kernels,
        SOFTMAX=softmax, BH=block_u, BC=block_c, BS=power(parts, 1, 32), BK=power(kernels, 2), num_warps=8,
    )  # fmt: skip
    return out

import triton
import triton.language as tl
from torch import Tensor

from ...operators.layout import empty_map
from ...operators.triton_maps import place


@triton.jit
def slopes_of(slopes, b, c, inside, channels):
    """Those of both functions of channels c, (BC, 1), from (B, 2, C)."""
    at = slopes + b * 2 * channels + c
    one, other = tl.load(at, inside, 0.0), tl.load(at + channels, inside, 0.0)
    return one.to(tl.float32)[:, None], other.to(tl.float32)[:, None]


@triton.jit
def dynamic_relu(x, one, other):
    return tl.maximum(x * one, x * other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["channels", "height"])
def forward_kernel(
    x, before, weight, bias, behind, y, channels, outputs, height, width,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    tile, block, b = place(tl.cdiv(height * width, BP), tl.cdiv(outputs, BC))
    p = tile * BP + tl.arange(0, BP)
    e = block * BC + tl.arange(0, BC)
    c, inside_e = e // (outputs // channels), e < outputs
    row, column = p // width, p % width
    sums = tl.zeros([BC, BP], tl.float32) + tl.load(bias + e, inside_e, 0.0).to(tl.float32)[:, None]
    if before is not None:
        one, other = slopes_of(before, b, c, inside_e, channels)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            h, w = row + i - 1, column + j - 1
            inside = inside_e[:, None] & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[None, :]
            at = c.to(tl.int64)[:, None] * x_c + (h.to(tl.int64) * x_h + w.to(tl.int64) * x_w)[None, :]
            value = tl.load(x + b * x_b + at, inside, 0.0).to(tl.float32)
            if before is not None:
                # The zeros around the map are not activated: infinite slopes would make them NaN.
                value = tl.where(inside, dynamic_relu(value, one, other), 0.0)
            value *= tl.load(weight + e * 9 + (3 * i + j), inside_e, 0.0).to(tl.float32)[:, None]
            sums += value
    one, other = slopes_of(behind, b, e, inside_e, outputs)
    sums = dynamic_relu(sums, one, other)
    at = e.to(tl.int64)[:, None] * y_c + (row.to(tl.int64) * y_h + column.to(tl.int64) * y_w)[None, :]
    tl.store(y + b * y_b + at, sums.to(y.dtype.element_ty), inside_e[:, None] & (row < height)[None, :])


def activated_depthwise(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, behind: Tensor
) -> Tensor:
    batch, channels, height, width = x.shape
    outputs = len(weight)
    y = empty_map(x, (batch, outputs, height, width))
    if y.numel() == 0:
        return y
    block_c, block_p = (64, 16) if x.stride(1) == 1 else (8, 64)
    grid = (triton.cdiv(height * width, block_p) * triton.cdiv(outputs, block_c) * batch,)
    forward_kernel[grid](
        x, None if before is None else before.contiguous(), weight.contiguous(), bias, behind.contiguous(), y,
        channels, outputs, height, width, *x.stride(), *y.stride(), BC=block_c, BP=block_p,
    )  # fmt: skip
    return y

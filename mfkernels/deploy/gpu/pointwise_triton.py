import triton
import triton.language as tl
from torch import Tensor

from ...operators.layout import empty_map
from ...operators.triton_maps import as_map, dot, gelu, place, power, rounded


@triton.jit
def pointwise_kernel(
    x, factors, shifts, weight, bias, residual, y, pixels, channels, outputs,
    x_b, x_c, x_p, r_b, r_c, r_p, y_b, y_c, y_p,
    GELU: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # The tiles of outputs are neighbours: what they read of the map is the same.
    block, tile, b = place(tl.cdiv(outputs, BO), tl.cdiv(pixels, BP))
    o = block * BO + tl.arange(0, BO)
    p = tile * BP + tl.arange(0, BP)
    inside_o, inside_p = (o < outputs)[:, None], (p < pixels)[None, :]
    wide_o, wide_p = o.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    source = x + b * x_b + wide_p * x_p
    sums = tl.zeros([BO, BP], tl.float32)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        inside_c = c < channels
        kernel = tl.load(weight + wide_o * channels + c[None, :], inside_o & inside_c[None, :], 0.0)
        pixel = tl.load(source + c.to(tl.int64)[:, None] * x_c, inside_c[:, None] & inside_p, 0.0)
        if factors is not None:
            factor = tl.load(factors + b * channels + c, inside_c, 0.0)[:, None]
            shift = tl.load(shifts + c, inside_c, 0.0).to(tl.float32)[:, None]
            pixel = rounded(gelu(pixel.to(tl.float32) * factor + shift), kernel)
        sums += dot(kernel, pixel)
    sums += tl.load(bias + o, o < outputs, 0.0).to(tl.float32)[:, None]
    if GELU:
        sums = gelu(sums)
    inside = inside_o & inside_p
    if residual is not None:
        sums += tl.load(residual + b * r_b + wide_o * r_c + wide_p * r_p, inside, 0.0).to(tl.float32)
    tl.store(y + b * y_b + wide_o * y_c + wide_p * y_p, sums.to(y.dtype.element_ty), inside)


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, gelu: bool,
    factors: Tensor | None = None, shifts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, channels, height, width = x.shape
    outputs, pixels = weight.shape[0], height * width
    y = empty_map(x, (batch, outputs, height, width))
    if y.numel() == 0:
        return y
    source, to = as_map(x), as_map(y)
    other = to if residual is None else as_map(residual)
    # In float32 tensor cores do not help, and the tiles' numbers are twice as wide.
    block_o, block_p = power(outputs, 16, 64), power(pixels, 16, 64 if x.element_size() < 4 else 32)
    grid = (triton.cdiv(outputs, block_o) * triton.cdiv(pixels, block_p) * batch,)
    pointwise_kernel[grid](
        source.tensor, factors, shifts, weight.contiguous(), bias,
        None if residual is None else other.tensor, y, pixels, channels, outputs,
        *source.strides, *other.strides, *to.strides,
        GELU=gelu, BO=block_o, BP=block_p, BC=32,
    )  # fmt: skip
    return y

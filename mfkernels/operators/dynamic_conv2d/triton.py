"""Convolutions as products with tiles of the kernels, mixed in registers: mixed ones are never in memory.

Where a group has one input channel (depthwise), sums along the taps instead of products.

The gradient of x is the same with the roles of input and output channels exchanged, TRANSPOSED: both take a
`source` map and give a `result` map, whose channels of a group are called rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import COUNTS, dot, gelu, place, power, splits_of
from .reference import Pair, output_size

# As COUNTS.
NUMBERS = [*COUNTS, "blocks", "samples", "H", "GH", "SH", "RH", "ph", "dh", "dw"]
# They need not be known but where they are 1, which makes a convolution a product, or spares divisions.
STEPS = ["kh", "kw", "sh", "sw", "multiplier"]


@triton.jit
def pixel_at(p, tap_y, tap_x, RW, sh, sw, ph, pw, dh, dw, SH, SW, TRANSPOSED: tl.constexpr):
    """Row and column of the source pixels that pixels p of the result meet at a tap, and which exist."""
    if TRANSPOSED:
        y, x = p // RW + ph - tap_y * dh, p % RW + pw - tap_x * dw
        inside = (y >= 0) & (x >= 0) & (y % sh == 0) & (x % sw == 0)
        y, x = y // sh, x // sw
    else:
        y, x = (p // RW) * sh - ph + tap_y * dh, (p % RW) * sw - pw + tap_x * dw
        inside = (y >= 0) & (x >= 0)
    return y, x, inside & (y < SH) & (x < SW)


@triton.jit
def mixed(weight, basis, attention, at, inside, kernels, size, scale):
    """Return the entries `at` of a sample's kernel."""
    value = tl.load(weight + at, inside, 0.0).to(tl.float32)
    others = value * 0
    for k in range(kernels):
        share = tl.load(attention + k).to(tl.float32)
        others += share * tl.load(basis + k * size + at, inside, 0.0).to(tl.float32)
    return value + scale * others


@triton.jit
def store_result(
    sums, o, inside_o, p, inside_p, b, result, r_b, r_c, r_y, r_x, RW, bias, basis_bias, attention, kernels,
    outputs, parts, part, GELU: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Store outputs o at pixels p of a sample, with the sample's biases, and their GELU where there is one.

    With a POWER, sums of the results' first or second powers over these pixels are stored in a row of parts
    (B, S, outputs), too.
    """
    if bias is not None:
        sums += tl.load(bias + o, inside_o, 0.0).to(tl.float32)[:, None]
    if basis_bias is not None:
        for k in range(kernels):
            share = tl.load(attention + k).to(tl.float32)
            sums += share * tl.load(basis_bias + k * outputs + o, inside_o, 0.0).to(tl.float32)[:, None]
    if GELU:
        sums = gelu(sums)
    inside = inside_o[:, None] & inside_p[None, :]
    if POWER > 0:
        kept = tl.where(inside, sums, 0.0)
        tl.store(parts + part * outputs + o, tl.sum(kept * kept if POWER == 2 else kept, 1), inside_o)
    y, x = (p // RW).to(tl.int64), p % RW
    to = result + b * r_b + o.to(tl.int64)[:, None] * r_c + y[None, :] * r_y + x[None, :] * r_x
    tl.store(to, sums.to(result.dtype.element_ty), inside)


@triton.jit
def add_sample(
    total, others, sums, b, tile, batch, at, inside, basis, attention, shares, kernels, size,
    BK: tl.constexpr,
):  # fmt: skip
    """Add a sample's gradient of a tile's kernels to the sums over samples, and stores <gradient, basis>."""
    k = tl.arange(0, BK)
    share = tl.load(attention + b * kernels + k, k < kernels, 0.0).to(tl.float32)
    for i in range(kernels):
        other = tl.load(basis + i * size + at, inside, 0.0).to(tl.float32)
        tl.store(shares + (tile * batch + b) * kernels + i, tl.sum(tl.sum(sums * other, 1), 0))
    return total + sums, others + share[:, None, None] * sums[None, :, :]


@triton.jit
def store_sums(total, others, part, at, inside, out, kernels, size, BK: tl.constexpr):
    k = tl.arange(0, BK)
    out += part * (1 + kernels) * size
    tl.store(out + at, total, inside)
    to = out + (1 + k)[:, None, None] * size + at[None, :, :]
    tl.store(to, others, (k < kernels)[:, None, None] & inside[None, :, :])


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=STEPS)
def dense_kernel(
    source, result, parts, weight, basis, attention, bias, basis_bias, kernels, size, scale,
    rows, sources, groups, blocks, SH, SW, RH, RW, kh, kw, sh, sw, ph, pw, dh, dw,
    s_b, s_c, s_y, s_x, r_b, r_c, r_y, r_x,
    TRANSPOSED: tl.constexpr, GELU: tl.constexpr, POWER: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Convolve densely, or transposed.

    `rows` and `sources` are the channels of a group in the result and in the source; `blocks` are of rows.
    """
    tile, block, b = place(tl.cdiv(RH * RW, BP), groups * blocks)
    p = tile * BP + tl.arange(0, BP)
    group, block = block // blocks, block % blocks
    r = block * BR + tl.arange(0, BR)
    inside_p, inside_r = p < RH * RW, r < rows
    taps = kh * kw
    depth = sources * taps
    attention += b * kernels
    sums = tl.zeros([BR, BP], tl.float32)
    for start in range(0, depth, BD):
        d = start + tl.arange(0, BD)
        c, tap = d // taps, d % taps
        if TRANSPOSED:
            at = ((group * sources + c) * rows * taps + tap)[None, :] + (r * taps)[:, None]
        else:
            at = (group * rows + r)[:, None] * depth + d[None, :]
        inside = inside_r[:, None] & (d < depth)[None, :]
        kernel = mixed(weight, basis, attention, at, inside, kernels, size, scale)
        y, x, met = pixel_at(
            p[None, :], (tap // kw)[:, None], (tap % kw)[:, None], RW, sh, sw, ph, pw, dh, dw, SH, SW,
            TRANSPOSED,
        )  # fmt: skip
        channel = (group * sources + c).to(tl.int64)[:, None]
        pixel = tl.load(
            source + b * s_b + channel * s_c + y.to(tl.int64) * s_y + x * s_x,
            met & inside_p[None, :] & (d < depth)[:, None], 0.0,
        )  # fmt: skip
        sums += dot(kernel, pixel)
    store_result(
        sums, group * rows + r, inside_r, p, inside_p, b, result, r_b, r_c, r_y, r_x, RW, bias, basis_bias,
        attention, kernels, size // depth, parts, b * tl.cdiv(RH * RW, BP) + tile, GELU, POWER,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=STEPS)
def depthwise_kernel(
    source, result, parts, weight, basis, attention, bias, basis_bias, kernels, size, scale,
    multiplier, channels, SH, SW, RH, RW, kh, kw, sh, sw, ph, pw, dh, dw,
    s_b, s_c, s_y, s_x, r_b, r_c, r_y, r_x,
    TRANSPOSED: tl.constexpr, GELU: tl.constexpr, POWER: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """channels: of the result; multiplier: outputs for each channel of x."""
    tile, block, b = place(tl.cdiv(RH * RW, BP), tl.cdiv(channels, BR))
    p = tile * BP + tl.arange(0, BP)
    r = block * BR + tl.arange(0, BR)
    inside_p, inside_r = p < RH * RW, r < channels
    taps = kh * kw
    attention += b * kernels
    sums = tl.zeros([BR, BP], tl.float32)
    for step in range((multiplier if TRANSPOSED else 1) * taps):
        tap = step % taps
        if TRANSPOSED:
            c = r * multiplier + step // taps
            output = c
        else:
            c = r // multiplier
            output = r
        kernel = mixed(weight, basis, attention, output * taps + tap, inside_r, kernels, size, scale)
        y, x, met = pixel_at(p, tap // kw, tap % kw, RW, sh, sw, ph, pw, dh, dw, SH, SW, TRANSPOSED)
        at = (y.to(tl.int64) * s_y + x * s_x)[None, :] + c.to(tl.int64)[:, None] * s_c
        inside = inside_r[:, None] & (met & inside_p)[None, :]
        sums += kernel[:, None] * tl.load(source + b * s_b + at, inside, 0.0).to(tl.float32)
    store_result(
        sums, r, inside_r, p, inside_p, b, result, r_b, r_c, r_y, r_x, RW, bias, basis_bias, attention,
        kernels, channels, parts, b * tl.cdiv(RH * RW, BP) + tile, GELU, POWER,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*NUMBERS, "rows"], do_not_specialize_on_alignment=STEPS)
def dense_weight_kernel(
    x, g, basis, attention, out, shares, kernels, size, batch, samples,
    rows, inputs, groups, blocks, H, W, GH, GW, kh, kw, sh, sw, ph, pw, dh, dw,
    x_b, x_c, x_y, x_x, g_b, g_c, g_y, g_x,
    BO: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum the kernels' gradients over a split of the samples: out (splits, 1 + K, size).

    The first is the plain sum, the others are weighted with the samples' attention; shares (tiles, B, K) hold
    a tile's part of <gradient, basis>.
    """
    taps = kh * kw
    depth = inputs * taps
    columns = tl.cdiv(depth, BD)
    block, column, part = place(groups * blocks, columns)
    tile = block * columns + column
    group, block = block // blocks, block % blocks
    o = block * BO + tl.arange(0, BO)
    d = column * BD + tl.arange(0, BD)
    c, tap = d // taps, d % taps
    inside = (o < rows)[:, None] & (d < depth)[None, :]
    at = (group * rows + o)[:, None] * depth + d[None, :]
    total = tl.zeros([BO, BD], tl.float32)
    others = tl.zeros([BK, BO, BD], tl.float32)
    for b in range(part * samples, tl.minimum((part + 1) * samples, batch)):
        sums = tl.zeros([BO, BD], tl.float32)
        for start in range(0, GH * GW, BP):
            p = start + tl.arange(0, BP)
            inside_p = p < GH * GW
            y, z, met = pixel_at(
                p[:, None], (tap // kw)[None, :], (tap % kw)[None, :], GW, sh, sw, ph, pw, dh, dw, H, W, False
            )  # fmt: skip
            channel = (group * inputs + c).to(tl.int64)[None, :]
            pixel = tl.load(
                x + b * x_b + channel * x_c + y.to(tl.int64) * x_y + z * x_x,
                met & inside_p[:, None] & (d < depth)[None, :], 0.0,
            )  # fmt: skip
            y, z = (p // GW).to(tl.int64), p % GW
            output = (group * rows + o).to(tl.int64)[:, None]
            grad = tl.load(
                g + b * g_b + output * g_c + y[None, :] * g_y + z[None, :] * g_x,
                (o < rows)[:, None] & inside_p[None, :], 0.0,
            )  # fmt: skip
            sums += dot(grad, pixel)
        total, others = add_sample(
            total, others, sums, b, tile, batch, at, inside, basis, attention, shares, kernels, size, BK
        )  # fmt: skip
    store_sums(total, others, part, at, inside, out, kernels, size, BK)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=STEPS)
def depthwise_weight_kernel(
    x, g, basis, attention, out, shares, kernels, size, batch, samples,
    outputs, multiplier, H, W, GH, GW, kh, kw, sh, sw, ph, pw, dh, dw,
    x_b, x_c, x_y, x_x, g_b, g_c, g_y, g_x,
    BO: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As dense_weight_kernel."""
    block, tap, part = place(tl.cdiv(outputs, BO), kh * kw)
    tile = block * (kh * kw) + tap
    o = block * BO + tl.arange(0, BO)
    inside_o = o < outputs
    at = (o * (kh * kw) + tap)[:, None]
    total = tl.zeros([BO, 1], tl.float32)
    others = tl.zeros([BK, BO, 1], tl.float32)
    for b in range(part * samples, tl.minimum((part + 1) * samples, batch)):
        sums = tl.zeros([BO, 1], tl.float32)
        for start in range(0, GH * GW, BP):
            p = start + tl.arange(0, BP)
            inside_p = p < GH * GW
            y, z, met = pixel_at(p, tap // kw, tap % kw, GW, sh, sw, ph, pw, dh, dw, H, W, False)
            where = (y.to(tl.int64) * x_y + z * x_x)[None, :] + (o // multiplier).to(tl.int64)[:, None] * x_c
            pixel = tl.load(x + b * x_b + where, inside_o[:, None] & (met & inside_p)[None, :], 0.0)
            where = ((p // GW).to(tl.int64) * g_y + (p % GW) * g_x)[None, :] + o.to(tl.int64)[:, None] * g_c
            grad = tl.load(g + b * g_b + where, inside_o[:, None] & inside_p[None, :], 0.0)
            sums += tl.sum(pixel.to(tl.float32) * grad.to(tl.float32), 1)[:, None]
        total, others = add_sample(
            total, others, sums, b, tile, batch, at, inside_o[:, None], basis, attention, shares, kernels,
            size, BK,
        )  # fmt: skip
    store_sums(total, others, part, at, inside_o[:, None], out, kernels, size, BK)


def _convolve(
    source: Tensor, result: Tensor, tensors: tuple, settings: tuple, groups: int, scale: float,
    transposed: bool, gelu: bool = False, power_of_sums: int = 0,
) -> Tensor:  # fmt: skip
    """Write `result`, the convolution of `source` or, transposed, its gradient's.

    Return sums of its pixels' first or second powers (B, S, C), in S parts, float32; S = 0 for power 0.
    """
    weight, basis, *_ = tensors
    batch, channels, height, width = result.shape
    outputs, inputs, *kernel = weight.shape
    pixels, rows, sources = height * width, channels // groups, source.shape[1] // groups
    if inputs == 1:
        block_r, block_p = 8, power(pixels, 16, 128)
    else:
        block_r, block_p = power(rows, 16, 32), power(pixels, 16, 64)
    if inputs > 1 and block_r == block_p == 32:
        block_p = 64  # of 32 by 32 ptxas spills
    tiles = triton.cdiv(pixels, block_p)
    shape = (batch, tiles if power_of_sums else 0, channels)
    parts = torch.empty(shape, dtype=torch.float32, device=source.device)
    if result.numel() == 0:
        return parts
    maps = (*source.shape[2:], height, width, *kernel, *settings, *source.stride(), *result.stride())
    first = (source, result, parts, *tensors, basis.shape[0], weight.numel(), scale)
    options: dict[str, Any] = dict(
        TRANSPOSED=transposed, GELU=gelu, POWER=power_of_sums, BR=block_r, BP=block_p
    )  # fmt: skip
    if inputs == 1:
        grid = (tiles * triton.cdiv(channels, block_r) * batch,)
        depthwise_kernel[grid](*first, outputs // groups, channels, *maps, **options)
        return parts
    blocks = triton.cdiv(rows, block_r)
    grid = (tiles * groups * blocks * batch,)
    dense_kernel[grid](*first, rows, sources, groups, blocks, *maps, **options, BD=16)
    return parts


def _weight_gradients(
    x: Tensor, g: Tensor, weight: Tensor, basis: Tensor, attention: Tensor, settings: tuple, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over the samples of their kernels' gradients G.

    These are the sums of G and of attention_k G, and <G, basis_k>.
    """
    batch, kernels = attention.shape
    outputs, inputs, *kernel = weight.shape
    taps, rows = kernel[0] * kernel[1], outputs // groups
    block_k = power(kernels)
    if inputs == 1:
        tiles = triton.cdiv(outputs, 8) * taps
    else:
        # Small: 1 + K such sums are held in registers.
        block_o, block_d = 16 if kernels > 1 else power(rows, 16, 32), 32
        blocks = triton.cdiv(rows, block_o)
        tiles = groups * blocks * triton.cdiv(inputs * taps, block_d)
    splits, samples = splits_of(batch, tiles, x.device, 1)
    out = x.new_empty((splits, 1 + kernels, *weight.shape), dtype=torch.float32)
    shares = x.new_zeros((tiles, batch, kernels), dtype=torch.float32)
    first = (x, g, basis, attention, out, shares, kernels, weight.numel(), batch, samples)
    maps = (*x.shape[2:], *g.shape[2:], *kernel, *settings, *x.stride(), *g.stride())
    if inputs == 1:
        # Of a single kernel ptxas spills.
        depthwise_weight_kernel[(tiles * splits,)](
            *first, outputs, rows, *maps, BO=8, BP=128, BK=max(2, block_k)
        )  # fmt: skip
    else:
        dense_weight_kernel[(tiles * splits,)](
            *first, rows, inputs, groups, blocks, *maps, BO=block_o, BD=block_d, BP=16, BK=block_k
        )  # fmt: skip
    sums = out.double().sum(0)
    return sums[0], sums[1:], shares.double().sum(0)


def forward(
    x: Tensor, weight: Tensor, basis: Tensor, attention: Tensor, bias: Tensor | None,
    basis_bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    basis_scale: float,
) -> Tensor:  # fmt: skip
    settings = (*stride, *padding, *dilation)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    out = empty_map(x, (x.shape[0], weight.shape[0], *size))
    tensors = _contiguous(weight, basis, attention, bias, basis_bias)
    _convolve(x, out, tensors, settings, groups, basis_scale, transposed=False)
    return out


def activated(
    x: Tensor, weight: Tensor, basis: Tensor, attention: Tensor, bias: Tensor | None, stride: int,
    padding: int, groups: int, basis_scale: float, gelu: bool, power_of_sums: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `forward` does or its GELU, and sums of its pixels' powers, see `_convolve`."""
    settings = (stride, stride, padding, padding, 1, 1)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, 1)
    out = empty_map(x, (x.shape[0], weight.shape[0], *size))
    tensors = _contiguous(weight, basis, attention, bias, None)
    return out, _convolve(x, out, tensors, settings, groups, basis_scale, False, gelu, power_of_sums)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, basis: Tensor, attention: Tensor, bias: Tensor | None,
    basis_bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    basis_scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    settings = (*stride, *padding, *dilation)
    weight, basis, attention, _, other = _contiguous(weight, basis, attention, None, basis_bias)
    grad_x = empty_map(x, x.shape)
    tensors = (weight, basis, attention, None, None)
    _convolve(grad_out, grad_x, tensors, settings, groups, basis_scale, transposed=True)
    grad_weight, grad_basis, grad_attention = _weight_gradients(
        x, grad_out, weight, basis, attention, settings, groups
    )
    grad_bias, grad_other = x.new_empty(0), x.new_empty(0)
    grad_basis, grad_attention = basis_scale * grad_basis, basis_scale * grad_attention
    if bias is not None or other is not None:
        sums = grad_out.sum((2, 3), dtype=torch.float32).double()
        grad_bias = sums.sum(0).to(x.dtype) if bias is not None else grad_bias
        if other is not None:
            grad_other = (attention.double().t() @ sums).to(x.dtype)
            grad_attention = grad_attention + sums @ other.double().t()
    grads = (grad_weight.to(x.dtype), grad_basis.to(x.dtype), grad_attention.to(x.dtype))
    return grad_x, *grads, grad_bias, grad_other


def _contiguous(*tensors: Any) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)

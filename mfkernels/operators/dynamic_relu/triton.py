import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import COUNTS, Map, as_map, place, power, splits_of


@triton.jit
def coefficient(
    values, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens, functions,
    MIXED: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Return the coefficients of function k, (BC, BP).

    `values` are (B, K, C); mixed (B, M, K, C), with `attention` (B, M, P).
    """
    mix = tl.zeros([BC, BP], tl.float32)
    if MIXED:
        for m in range(tokens):
            at = ((b * tokens + m) * functions + k) * channels
            value = tl.load(values + at + c, inside_c, 0.0).to(tl.float32)
            weight = tl.load(attention + (b * tokens + m) * pixels + p, inside_p, 0.0).to(tl.float32)
            mix += value[:, None] * weight[None, :]
    else:
        mix += tl.load(values + (b * functions + k) * channels + c, inside_c, 0.0).to(tl.float32)[:, None]
    return mix


@triton.jit
def function(
    x, slopes, intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens, functions,
    SHIFTED: tl.constexpr, MIXED: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Return function k of x, and its slope."""
    slope = coefficient(
        slopes, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens, functions, MIXED, BC, BP
    )
    value = x * slope
    if SHIFTED:
        value += coefficient(
            intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens, functions,
            MIXED, BC, BP,
        )  # fmt: skip
    return value, slope


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x, slopes, intercepts, attention, y, channels, pixels, tokens, functions,
    x_b, x_c, x_p, y_b, y_c, y_p,
    SHIFTED: tl.constexpr, MIXED: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    tile, block, b = place(tl.cdiv(pixels, BP), tl.cdiv(channels, BC))
    p = tile * BP + tl.arange(0, BP)
    c = block * BC + tl.arange(0, BC)
    inside_c, inside_p = c < channels, p < pixels
    inside = inside_c[:, None] & inside_p[None, :]
    c_wide, p_wide = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    value = tl.load(x + b * x_b + c_wide * x_c + p_wide * x_p, inside, 0.0).to(tl.float32)
    best = tl.full([BC, BP], float("-inf"), tl.float32)
    for k in range(functions):
        other, _ = function(
            value, slopes, intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens,
            functions, SHIFTED, MIXED, BC, BP,
        )  # fmt: skip
        best = tl.maximum(best, other, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + b * y_b + c_wide * y_c + p_wide * y_p, best.to(y.dtype.element_ty), inside)


@triton.jit
def shared_gradient(
    x, g, slopes, intercepts, attention, b, c, p, inside_c, inside_p, channels, pixels, tokens, functions,
    SHIFTED: tl.constexpr, MIXED: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Return the maximum of the functions, and the gradient that each of those that attain it gets."""
    best = tl.full([BC, BP], float("-inf"), tl.float32)
    for k in range(functions):
        value, _ = function(
            x, slopes, intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens,
            functions, SHIFTED, MIXED, BC, BP,
        )  # fmt: skip
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    ties = tl.zeros([BC, BP], tl.float32)
    for k in range(functions):
        value, _ = function(
            x, slopes, intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens,
            functions, SHIFTED, MIXED, BC, BP,
        )  # fmt: skip
        ties += (value == best).to(tl.float32)
    return best, g / ties


@triton.jit(do_not_specialize=COUNTS)
def backward_map_kernel(
    x, g, slopes, intercepts, attention, grad_x, grad_attention, channels, pixels, tokens, functions,
    x_b, x_c, x_p, g_b, g_c, g_p, out_b, out_c, out_p,
    SHIFTED: tl.constexpr, MIXED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of x and of the attention; a program has all channels of its pixels."""
    tile, _, b = place(tl.cdiv(pixels, BP), 1)
    p = tile * BP + tl.arange(0, BP)
    inside_p = p < pixels
    p_wide = p.to(tl.int64)[None, :]
    m = tl.arange(0, BM)
    sums = tl.zeros([BM, BP], tl.float32)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        inside_c = c < channels
        inside = inside_c[:, None] & inside_p[None, :]
        c_wide = c.to(tl.int64)[:, None]
        value = tl.load(x + b * x_b + c_wide * x_c + p_wide * x_p, inside, 0.0).to(tl.float32)
        grad = tl.load(g + b * g_b + c_wide * g_c + p_wide * g_p, inside, 0.0).to(tl.float32)
        best, share = shared_gradient(
            value, grad, slopes, intercepts, attention, b, c, p, inside_c, inside_p, channels, pixels,
            tokens, functions, SHIFTED, MIXED, BC, BP,
        )  # fmt: skip
        total = tl.zeros([BC, BP], tl.float32)
        for k in range(functions):
            other, slope = function(
                value, slopes, intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels,
                tokens, functions, SHIFTED, MIXED, BC, BP,
            )  # fmt: skip
            # Where x is NaN nothing equals the maximum, and the share is NaN.
            part = tl.where((other == best) | (best != best), share, 0.0)
            total += slope * part
            if MIXED:
                for token in range(tokens):
                    at = ((b * tokens + token) * functions + k) * channels
                    weight = tl.load(slopes + at + c, inside_c, 0.0).to(tl.float32)[:, None] * value
                    if SHIFTED:
                        weight += tl.load(intercepts + at + c, inside_c, 0.0).to(tl.float32)[:, None]
                    own = tl.sum(tl.where(inside, weight * part, 0.0), 0)
                    sums += tl.where((m == token)[:, None], own[None, :], 0.0)
        to = grad_x + b * out_b + c_wide * out_c + p_wide * out_p
        tl.store(to, total.to(grad_x.dtype.element_ty), inside)
    if MIXED:
        to = grad_attention + (b * tokens + m.to(tl.int64)[:, None]) * pixels + p_wide
        inside_m = (m < tokens)[:, None] & inside_p[None, :]
        tl.store(to, sums.to(grad_attention.dtype.element_ty), inside_m)


@triton.jit(do_not_specialize=COUNTS)
def backward_coefficients_kernel(
    x, g, slopes, intercepts, attention, out, channels, pixels, tokens, functions, split, splits,
    x_b, x_c, x_p, g_b, g_c, g_p,
    SHIFTED: tl.constexpr, MIXED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of slopes and intercepts over a split's pixels: out (2, B, splits, K, BM, C).

    BM is 1 where nothing is mixed. A program has one function.
    """
    blocks = tl.cdiv(channels, BC)
    part, block, both = place(splits, blocks)
    b, k = both // functions, both % functions
    c = block * BC + tl.arange(0, BC)
    inside_c = c < channels
    c_wide = c.to(tl.int64)[:, None]
    m = tl.arange(0, BM)
    slope_sums = tl.zeros([BM, BC], tl.float32)
    shift_sums = tl.zeros([BM, BC], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        inside_p = p < pixels
        inside = inside_c[:, None] & inside_p[None, :]
        p_wide = p.to(tl.int64)[None, :]
        value = tl.load(x + b * x_b + c_wide * x_c + p_wide * x_p, inside, 0.0).to(tl.float32)
        grad = tl.load(g + b * g_b + c_wide * g_c + p_wide * g_p, inside, 0.0).to(tl.float32)
        best, share = shared_gradient(
            value, grad, slopes, intercepts, attention, b, c, p, inside_c, inside_p, channels, pixels,
            tokens, functions, SHIFTED, MIXED, BC, BP,
        )  # fmt: skip
        other, _ = function(
            value, slopes, intercepts, attention, b, k, c, p, inside_c, inside_p, channels, pixels, tokens,
            functions, SHIFTED, MIXED, BC, BP,
        )  # fmt: skip
        own = tl.where(inside & ((other == best) | (best != best)), share, 0.0)
        if MIXED:
            for token in range(tokens):
                weight = tl.load(attention + (b * tokens + token) * pixels + p, inside_p, 0.0).to(tl.float32)
                weighted = own * weight[None, :]
                mine = (m == token)[:, None]
                slope_sums += tl.where(mine, tl.sum(weighted * value, 1)[None, :], 0.0)
                shift_sums += tl.where(mine, tl.sum(weighted, 1)[None, :], 0.0)
        else:
            slope_sums += tl.sum(own * value, 1)[None, :]
            shift_sums += tl.sum(own, 1)[None, :]
    batch = (tl.num_programs(0) // splits // blocks // functions).to(tl.int64)
    row = (b * splits + part) * functions + k
    to = out + (row * BM + m[:, None]) * channels + c[None, :]
    tl.store(to, slope_sums, inside_c[None, :])
    tl.store(to + batch * splits * functions * BM * channels, shift_sums, inside_c[None, :])


def _blocks(x: Map) -> tuple[int, int]:
    """Channels and pixels of a tile: long in the direction in which memory is."""
    return (64, 16) if x.strides[1] == 1 and x.strides[2] != 1 else (8, 64)


def _given(slopes: Tensor, intercepts: Tensor | None, attention: Tensor | None) -> tuple[list[Tensor], dict]:
    slopes = slopes.contiguous()
    shifts = slopes if intercepts is None else intercepts.contiguous()
    weights = slopes if attention is None else attention.contiguous()
    return [slopes, shifts, weights], dict(SHIFTED=intercepts is not None, MIXED=attention is not None)


def _sizes(x: Tensor, slopes: Tensor, attention: Tensor | None) -> tuple[int, int, int, int]:
    """Channels, pixels, tokens, functions."""
    tokens = 1 if attention is None else attention.shape[1]
    return x.shape[1], x.shape[2] * x.shape[3], tokens, slopes.shape[-2]


def forward(
    x: Tensor, slopes: Tensor, intercepts: Tensor | None = None, attention: Tensor | None = None
) -> Tensor:
    y = empty_map(x, x.shape)
    if x.numel() == 0:
        return y
    given, flags = _given(slopes, intercepts, attention)
    sizes, source, to = _sizes(x, slopes, attention), as_map(x), as_map(y)
    block_c, block_p = _blocks(source)
    grid = (triton.cdiv(sizes[1], block_p) * triton.cdiv(sizes[0], block_c) * x.shape[0],)
    forward_kernel[grid](
        source.tensor, *given, y, *sizes, *source.strides, *to.strides, **flags, BC=block_c, BP=block_p
    )
    return y


def backward(
    grad_out: Tensor,
    x: Tensor,
    slopes: Tensor,
    intercepts: Tensor | None = None,
    attention: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = empty_map(x, x.shape)
    grad_attention = x.new_empty(0) if attention is None else torch.empty_like(attention).contiguous()
    none = x.new_empty(0)
    if x.numel() == 0:
        grads = [none if v is None else torch.zeros_like(v) for v in (slopes, intercepts)]
        return grad_x, grads[0], grads[1], grad_attention.zero_()
    given, flags = _given(slopes, intercepts, attention)
    sizes, source, g, to = _sizes(x, slopes, attention), as_map(x), as_map(grad_out), as_map(grad_x)
    channels, pixels, tokens, functions = sizes
    batch, mixed = x.shape[0], attention is not None
    block_c, block_p = _blocks(source)
    block_m = power(tokens) if mixed else 1
    backward_map_kernel[(triton.cdiv(pixels, block_p) * batch,)](
        source.tensor, g.tensor, *given, grad_x, grad_attention, *sizes, *source.strides, *g.strides,
        *to.strides, **flags, BM=block_m, BC=block_c, BP=block_p,
    )  # fmt: skip
    groups = triton.cdiv(channels, block_c)
    count, size = splits_of(pixels, groups * batch * functions, x.device, block_p)
    out = torch.empty((2, batch, count, functions, block_m, channels), dtype=torch.float32, device=x.device)
    backward_coefficients_kernel[(count * groups * batch * functions,)](
        source.tensor, g.tensor, *given, out, *sizes, size, count, *source.strides, *g.strides,
        **flags, BM=block_m, BC=block_c, BP=block_p,
    )  # fmt: skip
    sums = out.double().sum(2)[:, :, :, :tokens].transpose(2, 3)  # (2, B, M, K, C)
    sums = sums.reshape(2, *slopes.shape).to(x.dtype)
    return grad_x, sums[0].contiguous(), none if intercepts is None else sums[1].contiguous(), grad_attention

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import (
    COUNTS,
    add_to_mean,
    as_map,
    dot,
    head_blocks,
    head_sizes,
    in_rows,
    place,
    rounded,
    splits_of,
)


@triton.jit
def seen(mask, b, p, pixels):
    """Return which of the pixels p of a sample there are; the mask, if there is one, hides the others."""
    inside = p < pixels
    if mask is not None:
        inside = inside & (tl.load(mask + b * pixels + p, inside, 1) == 0)
    return inside


@triton.jit(do_not_specialize=[*COUNTS, "q_b", "q_t"])
def forward_kernel(
    x, q, mask, out, stats, logits, scale, pixels, tokens, heads, depth, split, splits, q_b, q_t,
    x_b, x_c, x_p, KEEP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum a split's pixels weighted with exp(logit - top): out (B, splits, M, C).

    Stats (B, splits, heads, M, 2) are the largest logit, -inf where all of the split's pixels are masked, and
    the sum of the weights.
    """
    part, head, b = place(splits, heads)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    c = (head * depth + d).to(tl.int64)
    inside_token = (m < tokens)[:, None] & (d < depth)[None, :]
    queries = tl.load(q + b * q_b + m[:, None] * q_t + c[None, :], inside_token, 0.0)
    # Beside a mask not minus infinity: of a tile whose pixels are all masked it would give a NaN.
    top = tl.full([BM], float("-inf") if mask is None else -3.4e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, BD], tl.float32)
    found = 0
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        there = seen(mask, b, p, pixels)
        inside = (d < depth)[:, None] & there[None, :]
        p_wide = p.to(tl.int64)[None, :]
        pixel = tl.load(x + b * x_b + c[:, None] * x_c + p_wide * x_p, inside, 0.0)
        logit = dot(queries, pixel) * scale
        if KEEP:
            if mask is not None:
                logit = tl.where(there[None, :], logit, 0.0)
            to = logits + ((b * heads + head) * tokens + m[:, None]) * pixels + p_wide
            tl.store(to, logit.to(logits.dtype.element_ty), (m < tokens)[:, None] & (p < pixels)[None, :])
        logit = tl.where(there[None, :], logit, float("-inf"))
        if mask is not None:
            found = tl.maximum(found, tl.max(there.to(tl.int32), 0))
        higher = tl.maximum(top, tl.max(logit, 1))
        weights = tl.exp(logit - higher[:, None])
        rescale = tl.exp(top - higher)
        total = total * rescale + tl.sum(weights, 1)
        sums = sums * rescale[:, None] + dot(weights, tl.trans(pixel))
        top = higher
    if mask is not None:
        top = tl.where(found > 0, top, float("-inf"))
    row = (b * splits + part) * tokens + m
    tl.store(out + row[:, None] * heads * depth + c[None, :], sums, inside_token)
    to = stats + (((b * splits + part) * heads + head) * tokens + m) * 2
    tl.store(to, top, m < tokens)
    tl.store(to + 1, total, m < tokens)


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    sums, stats, out, kept, splits, tokens, heads, depth,
    MASKED: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Join the splits of `forward_kernel` for a token and a head.

    The results are out (B, M, C) and kept (B, heads, M, 2).
    """
    m, head, b = place(tokens, heads)
    d = tl.arange(0, BD)
    top = tl.full([1], float("-inf"), tl.float32)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        at = stats + (((b * splits + s) * heads + head) * tokens + m) * 2
        top = tl.maximum(top, tl.max(tl.load(at, s < splits, float("-inf")), 0))
    if MASKED:  # the sample has no other pixels, and all sums are zero
        nothing = top == float("-inf")
        top = tl.where(nothing, 0.0, top)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([BD], tl.float32)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        at = stats + (((b * splits + s) * heads + head) * tokens + m) * 2
        weights = tl.exp(tl.load(at, s < splits, float("-inf")) - top)
        total += tl.sum(weights * tl.load(at + 1, s < splits, 0.0), 0)
        rows = ((b * splits + s) * tokens + m) * heads + head
        inside = (s < splits)[:, None] & (d < depth)[None, :]
        tile = tl.load(sums + rows[:, None] * depth + d[None, :], inside, 0.0)
        mixed += tl.sum(weights[:, None] * tile, 0)
    if MASKED:
        total = tl.where(nothing, 1.0, total)
    row = (b * tokens + m) * heads + head
    tl.store(out + row * depth + d, (mixed / total).to(out.dtype.element_ty), d < depth)
    pair = kept + ((b * heads + head) * tokens + m) * 2 + tl.arange(0, 1)
    tl.store(pair, top)
    tl.store(pair + 1, total)


@triton.jit(do_not_specialize=COUNTS)
def means_kernel(
    x, q, mask, g, stats, out, scale, pixels, tokens, heads, depth, split, splits, x_b, x_c, x_p,
    BM: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute what a token's mean of the weights' gradients needs, over a split's pixels.

    With w the weights and dP their gradients, out (B, splits, heads, M, 4) is the largest w, its dP (the
    pivot), the sum of w, and that of w (dP - pivot). Where one weight is nearly one, the mean of dP is nearly
    its dP, and without the pivot their difference would lose its digits.
    """
    part, head, b = place(splits, heads)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    c = (head * depth + d).to(tl.int64)
    inside_m = m < tokens
    at = (b * tokens + m[:, None]) * heads * depth + c[None, :]
    queries = tl.load(q + at, inside_m[:, None] & (d < depth)[None, :], 0.0)
    grad_out = tl.load(g + at, inside_m[:, None] & (d < depth)[None, :], 0.0)
    stat = stats + ((b * heads + head) * tokens + m) * 2
    top = tl.load(stat, inside_m, 0.0)
    total = tl.load(stat + 1, inside_m, 1.0)
    largest = tl.full([BM], -1.0, tl.float32)
    pivot = tl.zeros([BM], tl.float32)
    weight_sum = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        there = seen(mask, b, p, pixels)
        inside = (d < depth)[:, None] & there[None, :]
        p_wide = p.to(tl.int64)[None, :]
        pixel = tl.load(x + b * x_b + c[:, None] * x_c + p_wide * x_p, inside, 0.0)
        logit = dot(queries, pixel) * scale
        weights = tl.exp(logit - top[:, None]) / total[:, None]
        weights = tl.where(there[None, :], weights, 0.0)
        grad = dot(grad_out, pixel)
        largest, pivot, weight_sum, sums = add_to_mean(weights, grad, largest, pivot, weight_sum, sums, BP)
    to = out + (((b * splits + part) * heads + head) * tokens + m) * 4
    tl.store(to, largest, inside_m)
    tl.store(to + 1, pivot, inside_m)
    tl.store(to + 2, weight_sum, inside_m)
    tl.store(to + 3, sums, inside_m)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    x, q, mask, g, grad_logits, stats, means, grad_x, sums, scale, pixels, tokens, heads, depth, split,
    splits, x_b, x_c, x_p, out_b, out_c, out_p,
    ATTENDED: tl.constexpr, KEPT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of q over a split's pixels: sums (B, splits, M, C).

    `means` (B, heads, M, 2) are the pivot, and the mean of the weights' gradients less the pivot.
    """
    part, head, b = place(splits, heads)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    c = (head * depth + d).to(tl.int64)
    inside_m = m < tokens
    inside_token = inside_m[:, None] & (d < depth)[None, :]
    at = (b * tokens + m[:, None]) * heads * depth + c[None, :]
    queries = tl.load(q + at, inside_token, 0.0)
    stat = stats + ((b * heads + head) * tokens + m) * 2
    top = tl.load(stat, inside_m, 0.0)
    total = tl.load(stat + 1, inside_m, 1.0)
    grad_out = queries
    pivot = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    if ATTENDED:
        grad_out = tl.load(g + at, inside_token, 0.0)
        both = means + ((b * heads + head) * tokens + m) * 2
        pivot = tl.load(both, inside_m, 0.0)
        mean = tl.load(both + 1, inside_m, 0.0)
    grad_q = tl.zeros([BM, BD], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        inside = (d < depth)[:, None] & (p < pixels)[None, :]
        there = seen(mask, b, p, pixels)
        seen_c = (d < depth)[:, None] & there[None, :]
        p_wide = p.to(tl.int64)[None, :]
        pixel = tl.load(x + b * x_b + c[:, None] * x_c + p_wide * x_p, seen_c, 0.0)
        logit = tl.zeros([BM, BP], tl.float32)
        out = tl.zeros([BD, BP], tl.float32)
        if ATTENDED:
            own = dot(queries, pixel) * scale
            weights = tl.exp(own - top[:, None]) / total[:, None]
            weights = tl.where(inside_m[:, None] & there[None, :], weights, 0.0)
            grad = dot(grad_out, pixel)
            logit += weights * (grad - pivot[:, None] - mean[:, None])
            out += dot(tl.trans(grad_out), rounded(weights, pixel))
        if KEPT:
            source = grad_logits + ((b * heads + head) * tokens + m[:, None]) * pixels + p_wide
            logit += tl.load(source, inside_m[:, None] & there[None, :], 0.0).to(tl.float32)
        logit = logit * scale
        out += dot(tl.trans(queries), rounded(logit, pixel))
        if mask is not None:
            out = tl.where(there[None, :], out, 0.0)
        tl.store(
            grad_x + b * out_b + c[:, None] * out_c + p_wide * out_p, out.to(grad_x.dtype.element_ty), inside
        )
        grad_q += dot(logit, tl.trans(pixel))
    to = sums + ((b * splits + part) * tokens + m[:, None]) * heads * depth + c[None, :]
    tl.store(to, grad_q, inside_token)


def forward(
    x: Tensor,
    q: Tensor,
    num_heads: int,
    scale: float | None = None,
    return_logits: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, source = head_sizes(x, q, num_heads), as_map(x)
    pixels, tokens, _, depth = sizes
    batch = x.shape[0]
    scale = depth**-0.5 if scale is None else scale
    blocks = head_blocks(tokens, depth)
    count, size = splits_of(pixels, batch * num_heads, x.device, blocks["BP"])
    kept = (batch, num_heads, tokens, *x.shape[2:]) if return_logits else (0,)
    logits = torch.empty(kept, dtype=x.dtype, device=x.device)
    sums = torch.empty((batch, count, tokens, num_heads, depth), dtype=torch.float32, device=x.device)
    stats = torch.empty((batch, count, num_heads, tokens, 2), dtype=torch.float32, device=x.device)
    softmax_stats = stats.new_empty((batch, num_heads, tokens, 2))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q = in_rows(q)
    if q.numel() > 0:
        forward_kernel[(count * num_heads * batch,)](
            source.tensor, q, _bytes(mask), sums, stats, logits, scale, *sizes, size, count, *q.stride()[:2],
            *source.strides, KEEP=return_logits, **blocks | dict(num_warps=4),
        )  # fmt: skip
        combine_kernel[(tokens * num_heads * batch,)](
            sums, stats, out, softmax_stats, count, tokens, num_heads, depth, mask is not None, 16,
            blocks["BD"],
        )  # fmt: skip
    return out, logits, softmax_stats


def backward(
    grad_out: Tensor | None,
    grad_logits: Tensor | None,
    x: Tensor,
    q: Tensor,
    softmax_stats: Tensor,
    num_heads: int,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_x = empty_map(x, x.shape)
    if q.numel() == 0 or x.numel() == 0:
        return grad_x.zero_(), torch.zeros_like(q)
    sizes, source, to = head_sizes(x, q, num_heads), as_map(x), as_map(grad_x)
    pixels, tokens, _, depth = sizes
    scale = depth**-0.5 if scale is None else scale
    blocks = head_blocks(tokens, depth)
    count, size = splits_of(pixels, x.shape[0] * num_heads, x.device, blocks["BP"])
    sums = torch.empty((x.shape[0], count, *q.shape[1:]), dtype=torch.float32, device=x.device)
    given = (q if grad_out is None else grad_out).contiguous()
    kept = q if grad_logits is None else grad_logits.contiguous()
    means, hidden = softmax_stats, _bytes(mask)
    if grad_out is not None:
        parts = torch.empty((x.shape[0], count, num_heads, tokens, 4), dtype=torch.float32, device=x.device)
        means_kernel[(count * num_heads * x.shape[0],)](
            source.tensor, q.contiguous(), hidden, given, softmax_stats, parts, scale, *sizes, size, count,
            *source.strides, **blocks | dict(BP=min(blocks["BP"], 32)),
        )  # fmt: skip
        largest, pivots, weights, part_sums = parts.unbind(-1)
        pivot = pivots.gather(1, largest.argmax(1, keepdim=True))
        mean = (part_sums + weights * (pivots - pivot)).sum(1)
        means = torch.stack([pivot.squeeze(1), mean], -1)
    backward_kernel[(count * num_heads * x.shape[0],)](
        source.tensor, q.contiguous(), hidden, given, kept, softmax_stats, means, grad_x, sums, scale, *sizes,
        size, count, *source.strides, *to.strides,
        ATTENDED=grad_out is not None, KEPT=grad_logits is not None, **blocks,
    )  # fmt: skip
    return grad_x, sums.double().sum(1).to(q.dtype)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)

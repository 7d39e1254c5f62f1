import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import COUNTS, as_map, dot, head_blocks, head_sizes, in_rows, place, rounded, splits_of


@triton.jit
def weights_of(x, k, scale, tokens, m, BM: tl.constexpr):
    """softmax(scale * k x) over the tokens, (BM, BP)."""
    logits = dot(k, x) * scale
    logits = tl.where((m < tokens)[:, None], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    return weights / tl.sum(weights, 0)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x, residual, k, v, y, scale, pixels, tokens, heads, depth,
    k_b, k_t, v_b, v_t, x_b, x_c, x_p, r_b, r_c, r_p, y_b, y_c, y_p,
    BM: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    tile, head, b = place(tl.cdiv(pixels, BP), heads)
    p = tile * BP + tl.arange(0, BP)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    c = (head * depth + d).to(tl.int64)
    inside = (d < depth)[:, None] & (p < pixels)[None, :]
    p_wide = p.to(tl.int64)[None, :]
    pixel = tl.load(x + b * x_b + c[:, None] * x_c + p_wide * x_p, inside, 0.0)
    if residual is not None:
        other = tl.load(residual + b * r_b + c[:, None] * r_c + p_wide * r_p, inside, 0.0)
        pixel = (pixel.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
    inside_token = (m < tokens)[:, None] & (d < depth)[None, :]
    keys = tl.load(k + b * k_b + m[:, None] * k_t + c[None, :], inside_token, 0.0)
    values = tl.load(v + b * v_b + m[:, None] * v_t + c[None, :], inside_token, 0.0)
    weights = weights_of(pixel, keys, scale, tokens, m, BM)
    out = pixel.to(tl.float32) + dot(tl.trans(values), rounded(weights, pixel))
    tl.store(y + b * y_b + c[:, None] * y_c + p_wide * y_p, out.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    x, k, v, g, grad_x, sums, scale, pixels, tokens, heads, depth, split, splits,
    x_b, x_c, x_p, g_b, g_c, g_p, out_b, out_c, out_p,
    BM: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of k and v over a split's pixels: sums (2, B, splits, M, C)."""
    part, head, b = place(splits, heads)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    c = (head * depth + d).to(tl.int64)
    at = (b * tokens + m[:, None]) * heads * depth + c[None, :]
    inside_token = (m < tokens)[:, None] & (d < depth)[None, :]
    keys = tl.load(k + at, inside_token, 0.0)
    values = tl.load(v + at, inside_token, 0.0)
    grad_keys = tl.zeros([BM, BD], tl.float32)
    grad_values = tl.zeros([BM, BD], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        inside = (d < depth)[:, None] & (p < pixels)[None, :]
        p_wide = p.to(tl.int64)[None, :]
        pixel = tl.load(x + b * x_b + c[:, None] * x_c + p_wide * x_p, inside, 0.0)
        grad = tl.load(g + b * g_b + c[:, None] * g_c + p_wide * g_p, inside, 0.0)
        weights = weights_of(pixel, keys, scale, tokens, m, BM)
        grad_weights = dot(values, grad)
        mean = tl.sum(weights * grad_weights, 0)
        logits = weights * (grad_weights - mean[None, :]) * scale
        out = grad.to(tl.float32) + dot(tl.trans(keys), rounded(logits, pixel))
        tl.store(
            grad_x + b * out_b + c[:, None] * out_c + p_wide * out_p, out.to(grad_x.dtype.element_ty), inside
        )
        grad_keys += dot(logits, tl.trans(pixel))
        grad_values += dot(weights, tl.trans(grad))
    to = sums + ((b * splits + part) * tokens + m[:, None]) * heads * depth + c[None, :]
    tl.store(to, grad_keys, inside_token)
    batch = (tl.num_programs(0) // splits // heads).to(tl.int64)
    tl.store(to + batch * splits * tokens * heads * depth, grad_values, inside_token)


def forward(x: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    return with_residual(x, None, k, v, num_heads, scale)


def with_residual(
    x: Tensor, residual: Tensor | None, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None
) -> Tensor:
    """Return what `forward` does with x + residual."""
    y = empty_map(x, x.shape)
    if x.numel() == 0:
        return y
    sizes, source, to = head_sizes(x, k, num_heads), as_map(x), as_map(y)
    other = source if residual is None else as_map(residual)
    k, v = in_rows(k), in_rows(v)
    scale = sizes[3] ** -0.5 if scale is None else scale
    blocks = head_blocks(sizes[1], sizes[3])
    grid = (triton.cdiv(sizes[0], blocks["BP"]) * num_heads * x.shape[0],)
    forward_kernel[grid](
        source.tensor, None if residual is None else other.tensor, k, v, y, scale, *sizes,
        *k.stride()[:2], *v.stride()[:2], *source.strides, *other.strides, *to.strides, **blocks,
    )  # fmt: skip
    return y


def backward(
    grad_out: Tensor, x: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_map(x, x.shape)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(k), torch.zeros_like(v)
    sizes, source, g, to = head_sizes(x, k, num_heads), as_map(x), as_map(grad_out), as_map(grad_x)
    scale = sizes[3] ** -0.5 if scale is None else scale
    blocks = head_blocks(sizes[1], sizes[3])
    count, size = splits_of(sizes[0], x.shape[0] * num_heads, x.device, blocks["BP"])
    stages = 2 if blocks["BP"] == 64 else 3  # as ptxas does without spilling
    sums = torch.empty((2, x.shape[0], count, *k.shape[1:]), dtype=torch.float32, device=x.device)
    backward_kernel[(count * num_heads * x.shape[0],)](
        source.tensor, k.contiguous(), v.contiguous(), g.tensor, grad_x, sums, scale, *sizes, size, count,
        *source.strides, *g.strides, *to.strides, **blocks, num_stages=stages,
    )  # fmt: skip
    grad_k, grad_v = sums.double().sum(2).to(x.dtype)
    return grad_x, grad_k, grad_v

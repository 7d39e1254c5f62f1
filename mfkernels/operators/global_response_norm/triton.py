import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import Map, as_map, splits_of, tile_sizes


@triton.jit
def sums_kernel(
    x, g, out, channels, pixels, split, splits,
    x_b, x_c, x_p, g_b, g_c, g_p, BOTH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out (B, splits, 3, C): sums over a split's pixels of x^2, x g and g; without BOTH only the first."""
    part, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * BC + tl.arange(0, BC)
    inside_c = c < channels
    squares = tl.zeros([BC], tl.float32)
    products = tl.zeros([BC], tl.float32)
    sums = tl.zeros([BC], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        inside = inside_c[:, None] & (p < pixels)[None, :]
        c_wide, p_wide = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
        value = tl.load(x + b * x_b + c_wide * x_c + p_wide * x_p, inside, 0.0).to(tl.float32)
        squares += tl.sum(value * value, 1)
        if BOTH:
            grad = tl.load(g + b * g_b + c_wide * g_c + p_wide * g_p, inside, 0.0).to(tl.float32)
            products += tl.sum(value * grad, 1)
            sums += tl.sum(grad, 1)
    to = out + (b * splits + part) * 3 * channels + c
    tl.store(to, squares, inside_c)
    tl.store(to + channels, products, inside_c)
    tl.store(to + 2 * channels, sums, inside_c)


@triton.jit
def apply_kernel(
    a, other, out, scale, by_other, shift, channels, pixels,
    a_b, a_c, a_p, other_b, other_c, other_p, out_b, out_c, out_p,
    BOTH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out = scale * a + by_other * other with BOTH, else scale * a + shift; factors (B, C), shift (C)."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    b = tl.program_id(2).to(tl.int64)
    inside_c = c < channels
    inside = inside_c[:, None] & (p < pixels)[None, :]
    c_wide, p_wide = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    value = tl.load(a + b * a_b + c_wide * a_c + p_wide * a_p, inside, 0.0).to(tl.float32)
    value = value * tl.load(scale + b * channels + c, inside_c, 0.0)[:, None]
    if BOTH:
        second = tl.load(other + b * other_b + c_wide * other_c + p_wide * other_p, inside, 0.0)
        value += second.to(tl.float32) * tl.load(by_other + b * channels + c, inside_c, 0.0)[:, None]
    else:
        value += tl.load(shift + c, inside_c, 0.0).to(tl.float32)[:, None]
    tl.store(out + b * out_b + c_wide * out_c + p_wide * out_p, value.to(out.dtype.element_ty), inside)


def _sums(x: Map, g: Map | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the pixels, (B, C) each."""
    batch, channels, height, width = x.tensor.shape
    block_c, block_p = tile_sizes(x)
    groups = triton.cdiv(channels, block_c)
    count, size = splits_of(height * width, batch * groups, x.tensor.device, block_p)
    out = torch.empty((batch, count, 3, channels), dtype=torch.float32, device=x.tensor.device)
    other = x if g is None else g
    if out.numel():
        sums_kernel[count, groups, batch](
            x.tensor, other.tensor, out, channels, height * width, size, count,
            *x.strides, *other.strides, g is not None, block_c, block_p,
        )  # fmt: skip
    squares, products, sums = out.double().sum(1).unbind(1)
    return squares, products, sums


def _apply(a: Map, other: Map | None, out: Map, scale: Tensor, factor: Tensor) -> None:
    batch, channels, height, width = a.tensor.shape
    if a.tensor.numel() == 0:
        return
    block_c, block_p = tile_sizes(a)
    grid = (triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch)
    second, factor = other or a, factor.contiguous()
    apply_kernel[grid](
        a.tensor, second.tensor, out.tensor, scale.float().contiguous(), factor, factor,
        channels, height * width, *a.strides, *second.strides, *out.strides,
        other is not None, block_c, block_p,
    )  # fmt: skip


def _means(norms: Tensor, mean: str) -> Tensor:
    return norms.mean(1, keepdim=True) if mean == "channels" else norms


def forward(x: Tensor, gamma: Tensor, beta: Tensor, mean: str = "channels", eps: float = 1e-6) -> Tensor:
    out, given = empty_map(x, x.shape), as_map(x)
    norms = _sums(given, None)[0].sqrt()
    scale = 1 + gamma.double() * norms / (_means(norms, mean) + eps)
    _apply(given, None, as_map(out), scale, beta.float())
    return out


def backward(
    grad_out: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: str = "channels", eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, given, g = empty_map(x, x.shape), as_map(x), as_map(grad_out)
    squares, products, sums = _sums(given, g)
    norms = squares.sqrt()
    below = _means(norms, mean) + eps
    response = norms / below
    grad_response = gamma.double() * products
    if mean == "channels":
        through_mean = -(grad_response * norms).sum(1, keepdim=True) / below.square()
        grad_norms = grad_response / below + through_mean / x.shape[1]
    else:
        grad_norms = grad_response * eps / below.square()
    other = torch.where(norms == 0, 0.0, grad_norms / norms)
    _apply(g, given, as_map(grad_x), 1 + gamma.double() * response, other.float())
    grad_gamma = (response * products).sum(0).to(gamma.dtype)
    return grad_x, grad_gamma, sums.sum(0).to(beta.dtype)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import (
    COUNTS,
    Map,
    as_map,
    gelu,
    load_tile,
    load_vector,
    map_grid,
    place,
    power,
    splits_of,
    store_tile,
    tile_sizes,
)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    x, g, out, channels, pixels, split, splits,
    x_b, x_c, x_p, g_b, g_c, g_p, BOTH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum x^2, x g and g over a split's pixels: out (B, splits, 3, C); without BOTH only the first."""
    part, block, b = place(splits, tl.cdiv(channels, BC))
    c = block * BC + tl.arange(0, BC)
    inside_c = c < channels
    squares = tl.zeros([BC], tl.float32)
    products = tl.zeros([BC], tl.float32)
    sums = tl.zeros([BC], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, pixels), BP):
        p = start + tl.arange(0, BP)
        value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
        squares += tl.sum(value * value, 1)
        if BOTH:
            grad = load_tile(g, b, c, p, channels, pixels, g_b, g_c, g_p)
            products += tl.sum(value * grad, 1)
            sums += tl.sum(grad, 1)
    to = out + (b * splits + part) * 3 * channels + c
    tl.store(to, squares, inside_c)
    tl.store(to + channels, products, inside_c)
    tl.store(to + 2 * channels, sums, inside_c)


@triton.jit(do_not_specialize=[*COUNTS, "channels"])
def join_kernel(parts, out, channels, splits, BOTH: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """Store out (B, 3, C), float64: the norms, and with BOTH the other two sums of all splits together."""
    block, _, b = place(tl.cdiv(channels, BC), 1)
    c = block * BC + tl.arange(0, BC)
    to = out + b * 3 * channels + c
    tl.store(to, tl.sqrt(total(parts, 0, b, c, channels, splits, BS, BC)), c < channels)
    if BOTH:
        tl.store(to + channels, total(parts, 1, b, c, channels, splits, BS, BC), c < channels)
        tl.store(to + 2 * channels, total(parts, 2, b, c, channels, splits, BS, BC), c < channels)


@triton.jit
def total(parts, which, b, c, channels, splits, BS: tl.constexpr, BC: tl.constexpr):
    """One of the three sums of a sample."""
    sums = tl.zeros([BC], tl.float64)
    for start in range(0, splits, BS):
        split = start + tl.arange(0, BS)
        at = ((b * splits + split)[:, None] * 3 + which) * channels + c[None, :]
        inside = (split < splits)[:, None] & (c < channels)[None, :]
        sums += tl.sum(tl.load(parts + at, inside, 0.0).to(tl.float64), 0)
    return sums


@triton.jit
def apply_kernel(
    x, out, gamma, beta, sums, eps, channels, pixels, x_b, x_c, x_p, out_b, out_c, out_p,
    MEAN: tl.constexpr, GELU: tl.constexpr, BALL: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute out = x (1 + gamma norm / (mean + eps)) + beta, and its GELU where there is one.

    With MEAN the mean is over the BALL or fewer channels, else it is the norm itself; sums (B, 3, C) begin
    with the norms.
    """
    tile, block, b = place(tl.cdiv(pixels, BP), tl.cdiv(channels, BC))
    p = tile * BP + tl.arange(0, BP)
    c = block * BC + tl.arange(0, BC)
    inside_c = c < channels
    norms = sums + b * 3 * channels
    norm = tl.load(norms + c, inside_c, 0.0)
    below = norm + eps
    if MEAN:
        every = tl.arange(0, BALL)
        below = tl.sum(tl.load(norms + every, every < channels, 0.0), 0) / channels + eps
    factor = 1.0 + load_vector(gamma, c, channels, 0.0) * norm / below
    value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
    value = value * factor.to(tl.float32)[:, None] + tl.load(beta + c, inside_c, 0.0).to(tl.float32)[:, None]
    if GELU:
        value = gelu(value)
    store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p)


@triton.jit
def gradient_kernel(
    x, g, out, gamma, sums, grads, eps, channels, pixels,
    x_b, x_c, x_p, g_b, g_c, g_p, out_b, out_c, out_p,
    MEAN: tl.constexpr, BALL: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x, and each sample's shares of those of gamma and beta.

    The shares are grads (B, 2, C) in float64.
    """
    tile, block, b = place(tl.cdiv(pixels, BP), tl.cdiv(channels, BC))
    p = tile * BP + tl.arange(0, BP)
    c = block * BC + tl.arange(0, BC)
    inside_c = c < channels
    norms, products = sums + b * 3 * channels, sums + (b * 3 + 1) * channels
    norm, product = tl.load(norms + c, inside_c, 0.0), tl.load(products + c, inside_c, 0.0)
    own = load_vector(gamma, c, channels, 0.0)
    through = own * product  # the gradient of the response
    if MEAN:
        every = tl.arange(0, BALL)
        all_norms = tl.load(norms + every, every < channels, 0.0)
        all_through = load_vector(gamma, every, channels, 0.0) * tl.load(
            products + every, every < channels, 0.0
        )
        below = tl.sum(all_norms, 0) / channels + eps
        grad_norm = through / below - tl.sum(all_through * all_norms, 0) / (below * below * channels)
    else:
        below = norm + eps
        grad_norm = through * eps / (below * below)
    response = norm / below
    other = tl.where(norm == 0, 0.0, grad_norm / tl.where(norm == 0, 1.0, norm)).to(tl.float32)
    factor = (1.0 + own * response).to(tl.float32)
    if tile == 0:
        to = grads + b * 2 * channels + c
        tl.store(to, response * product, inside_c)
        tl.store(to + channels, tl.load(norms + 2 * channels + c, inside_c, 0.0), inside_c)
    value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
    grad = load_tile(g, b, c, p, channels, pixels, g_b, g_c, g_p)
    value = grad * factor[:, None] + value * other[:, None]
    store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p)


def _sums(x: Map, g: Map | None) -> Tensor:
    """Norms, and sums of x g and of g over the pixels: (B, 3, C), float64; without g only the first."""
    batch, channels, height, width = x.tensor.shape
    block_c, block_p = tile_sizes(x)
    groups, other = triton.cdiv(channels, block_c), g or x
    splits, size = splits_of(height * width, batch * groups, x.tensor.device, block_p)
    parts = x.tensor.new_empty((batch, splits, 3, channels), dtype=torch.float32)
    sums_kernel[(splits * groups * batch,)](
        x.tensor, other.tensor, parts, channels, height * width, size, splits,
        *x.strides, *other.strides, g is not None, block_c, block_p,
    )  # fmt: skip
    out = x.tensor.new_empty((batch, 3, channels), dtype=torch.float64)
    grid = (triton.cdiv(channels, 16) * batch,)
    join_kernel[grid](parts, out, channels, splits, g is not None, power(splits, 1, 64), 16)
    return out


def forward(x: Tensor, gamma: Tensor, beta: Tensor, mean: str = "channels", eps: float = 1e-6) -> Tensor:
    return activated(x, gamma, beta, mean, eps, gelu=False)


def activated(x: Tensor, gamma: Tensor, beta: Tensor, mean: str, eps: float, gelu: bool = True) -> Tensor:
    """Return the normed map, or its GELU."""
    out, given = empty_map(x, x.shape), as_map(x)
    if x.numel() == 0:
        return out
    to = as_map(out)
    apply_kernel[map_grid(given)](
        given.tensor, to.tensor, gamma.contiguous(), beta.contiguous(), _sums(given, None), eps,
        x.shape[1], x.shape[2] * x.shape[3], *given.strides, *to.strides,
        mean == "channels", gelu, power(x.shape[1]), *tile_sizes(given),
    )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: str = "channels", eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, given, g = empty_map(x, x.shape), as_map(x), as_map(grad_out)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(gamma), torch.zeros_like(beta)
    to = as_map(grad_x)
    shares = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float64)
    gradient_kernel[map_grid(given)](
        given.tensor, g.tensor, to.tensor, gamma.contiguous(), _sums(given, g), shares, eps,
        x.shape[1], x.shape[2] * x.shape[3], *given.strides, *g.strides, *to.strides,
        mean == "channels", power(x.shape[1]), *tile_sizes(given),
    )  # fmt: skip
    grad_gamma, grad_beta = shares.sum(0).unbind(0)
    return grad_x, grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)

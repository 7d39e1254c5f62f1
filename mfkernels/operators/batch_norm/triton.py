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
def moments_kernel(
    x, out, channels, pixels, split, splits, x_b, x_c, x_p, BC: tl.constexpr, BP: tl.constexpr
):
    """Store the mean of a split's pixels and the sum of squared distances from it: out (B, splits, 2, C)."""
    part, block, b = place(splits, tl.cdiv(channels, BC))
    c = block * BC + tl.arange(0, BC)
    first, last = part * split, tl.minimum((part + 1) * split, pixels)
    total = tl.zeros([BC], tl.float32)
    for start in range(first, last, BP):
        total += tl.sum(load_tile(x, b, c, start + tl.arange(0, BP), channels, last, x_b, x_c, x_p), 1)
    mean = total / (last - first)
    squares = tl.zeros([BC], tl.float32)
    for start in range(first, last, BP):
        p = start + tl.arange(0, BP)
        distance = load_tile(x, b, c, p, channels, last, x_b, x_c, x_p) - mean[:, None]
        squares += tl.sum(tl.where((p < last)[None, :], distance * distance, 0.0), 1)
    to = out + (b * splits + part) * 2 * channels + c
    tl.store(to, mean, c < channels)
    tl.store(to + channels, squares, c < channels)


@triton.jit(do_not_specialize=[*COUNTS, "channels", "pixels"])
def join_moments_kernel(
    parts, mean, rest, variance, channels, pixels, split, splits, batch, BR: tl.constexpr, BC: tl.constexpr
):
    """Mean and variance (C) of the parts (B, splits, 2, C) together.

    The mean is a float32, and the rest that its rounding leaves off.
    """
    c, count = tl.program_id(0) * BC + tl.arange(0, BC), batch * splits
    total = tl.zeros([BC], tl.float64)
    for start in range(0, count, BR):
        means, sizes = part_of(parts, 0, start + tl.arange(0, BR), c, channels, pixels, split, splits, count)
        total += tl.sum(means * sizes[:, None], 0)
    every = batch.to(tl.float64) * pixels
    exact = total / every
    squares = tl.zeros([BC], tl.float64)
    for start in range(0, count, BR):
        rows = start + tl.arange(0, BR)
        means, sizes = part_of(parts, 0, rows, c, channels, pixels, split, splits, count)
        spread, _ = part_of(parts, 1, rows, c, channels, pixels, split, splits, count)
        distance = tl.where((rows < count)[:, None], means - exact[None, :], 0.0)
        squares += tl.sum(spread + distance * distance * sizes[:, None], 0)
    near, inside = exact.to(tl.float32), c < channels
    tl.store(mean + c, near, inside)
    tl.store(rest + c, (exact - near.to(tl.float64)).to(tl.float32), inside)
    tl.store(variance + c, (squares / every).to(tl.float32), inside)


@triton.jit
def part_of(parts, which, rows, c, channels, pixels, split, splits, count):
    """Numbers of some parts in float64, and how many pixels each is of."""
    inside = (rows < count)[:, None] & (c < channels)[None, :]
    at = (2 * rows.to(tl.int64)[:, None] + which) * channels + c[None, :]
    sizes = tl.minimum(split, pixels - rows % splits * split)
    return tl.load(parts + at, inside, 0.0).to(tl.float64), sizes.to(tl.float64)


@triton.jit
def apply_kernel(
    x, out, weight, bias, mean, rest, variance, eps, channels, pixels, x_b, x_c, x_p, out_b, out_c, out_p,
    GELU: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute out = (x - mean) / sqrt(variance + eps) * weight + bias and its activation."""
    tile, block, b = place(tl.cdiv(pixels, BP), tl.cdiv(channels, BC))
    p = tile * BP + tl.arange(0, BP)
    c = block * BC + tl.arange(0, BC)
    value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
    value = normal(value, weight, bias, mean, rest, variance, eps, c, channels)[1]
    if GELU:
        value = gelu(value)
    store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p)


@triton.jit
def factors(weight, variance, eps, c, channels):
    """1 / deviation, and the factor of the distances from the mean; in float64."""
    inverse = 1.0 / tl.sqrt(load_vector(variance, c, channels, 1.0) + eps)
    return inverse, load_vector(weight, c, channels, 0.0) * inverse


@triton.jit
def normal(value, weight, bias, mean, rest, variance, eps, c, channels):
    """Return the distances from the mean, and the activation's input; `rest` is what the mean lacks."""
    inside = c < channels
    scale = factors(weight, variance, eps, c, channels)[1]
    shift = load_vector(bias, c, channels, 0.0)
    if rest is not None:
        shift -= tl.load(rest + c, inside, 0.0).to(tl.float64) * scale
    distance = value - tl.load(mean + c, inside, 0.0).to(tl.float32)[:, None]
    return distance, distance * scale.to(tl.float32)[:, None] + shift.to(tl.float32)[:, None]


@triton.jit
def before_activation(grad, before, GELU: tl.constexpr):
    """Return the gradient before the activation."""
    if GELU:
        below = 0.5 * (1 + tl.erf(before * 0.7071067811865476))
        grad = grad * (below + before * tl.exp(-0.5 * before * before) * 0.3989422804014327)
    return grad


@triton.jit(do_not_specialize=COUNTS)
def gradient_sums_kernel(
    x, g, out, weight, bias, mean, variance, eps, channels, pixels, split, splits,
    x_b, x_c, x_p, g_b, g_c, g_p, GELU: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum d, the gradient before the activation, and d (x - mean) over a split's pixels.

    The result is out (B, splits, 2, C).
    """
    part, block, b = place(splits, tl.cdiv(channels, BC))
    c = block * BC + tl.arange(0, BC)
    sums = tl.zeros([BC], tl.float32)
    products = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * split, pixels)
    for start in range(part * split, last, BP):
        p = start + tl.arange(0, BP)
        value = load_tile(x, b, c, p, channels, last, x_b, x_c, x_p)
        distance, before = normal(value, weight, bias, mean, None, variance, eps, c, channels)
        grad = load_tile(g, b, c, p, channels, last, g_b, g_c, g_p)
        grad = before_activation(grad, before, GELU)
        sums += tl.sum(grad, 1)
        products += tl.sum(grad * distance, 1)
    to = out + (b * splits + part) * 2 * channels + c
    tl.store(to, sums, c < channels)
    tl.store(to + channels, products, c < channels)


@triton.jit(do_not_specialize=[*COUNTS, "channels", "pixels"])
def join_gradients_kernel(
    parts, weight, variance, eps, grad_mean, grad_variance,
    numbers, grads, channels, pixels, splits, batch,
    MEASURED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Join the sums of the parts (B, splits, 2, C) into the gradients (4, C) of everything but x.

    Where the statistics were measured, also store what their gradients add to that of x: the first of
    `numbers` (2, C) times the distance from the mean, and the second as it is.
    """
    c, count = tl.program_id(0) * BC + tl.arange(0, BC), batch * splits
    sums = tl.zeros([BC], tl.float64)
    products = tl.zeros([BC], tl.float64)
    for start in range(0, count, BR):
        rows = start + tl.arange(0, BR)
        sums += tl.sum(part_of(parts, 0, rows, c, channels, pixels, 1, splits, count)[0], 0)
        products += tl.sum(part_of(parts, 1, rows, c, channels, pixels, 1, splits, count)[0], 0)
    inside = c < channels
    inverse, scale = factors(weight, variance, eps, c, channels)
    through_mean = -scale * sums
    through_variance = -0.5 * scale * inverse * inverse * products
    tl.store(grads + c, (inverse * products).to(tl.float32), inside)
    tl.store(grads + channels + c, sums.to(tl.float32), inside)
    tl.store(grads + 2 * channels + c, through_mean.to(tl.float32), inside)
    tl.store(grads + 3 * channels + c, through_variance.to(tl.float32), inside)
    if MEASURED:
        if grad_mean is not None:
            through_mean += tl.load(grad_mean + c, inside, 0.0).to(tl.float64)
        if grad_variance is not None:
            through_variance += tl.load(grad_variance + c, inside, 0.0).to(tl.float64)
        every = batch.to(tl.float64) * pixels
        tl.store(numbers + c, (2 * through_variance / every).to(tl.float32), inside)
        tl.store(numbers + channels + c, (through_mean / every).to(tl.float32), inside)


@triton.jit
def gradient_kernel(
    x, g, out, weight, bias, mean, variance, eps, numbers, channels, pixels,
    x_b, x_c, x_p, g_b, g_c, g_p, out_b, out_c, out_p,
    GELU: tl.constexpr, MEASURED: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute out = d * scale, and with MEASURED + (x - mean) * numbers[0] + numbers[1]; numbers (2, C)."""
    tile, block, b = place(tl.cdiv(pixels, BP), tl.cdiv(channels, BC))
    p = tile * BP + tl.arange(0, BP)
    c = block * BC + tl.arange(0, BC)
    value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
    distance, before = normal(value, weight, bias, mean, None, variance, eps, c, channels)
    grad = load_tile(g, b, c, p, channels, pixels, g_b, g_c, g_p)
    grad = before_activation(grad, before, GELU)
    value = grad * factors(weight, variance, eps, c, channels)[1].to(tl.float32)[:, None]
    if MEASURED:
        inside = c < channels
        value += distance * tl.load(numbers + c, inside, 0.0)[:, None]
        value += tl.load(numbers + channels + c, inside, 0.0)[:, None]
    store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p)


class _Splits:
    """The pixels of a map in parts, which are summed by programs of their own."""

    def __init__(self, x: Map) -> None:
        batch, channels, height, width = x.tensor.shape
        block_c, block_p = tile_sizes(x)
        groups = triton.cdiv(channels, block_c)
        splits, size = splits_of(height * width, batch * groups, x.tensor.device, block_p)
        self.grid = (splits * groups * batch,)
        self.out = x.tensor.new_empty((batch * splits, 2, channels), dtype=torch.float32)
        self.arguments = (channels, height * width, size, splits)
        # Of the kernels that join the parts.
        self.join_grid = (triton.cdiv(channels, 16),)
        self.blocks = (power(batch * splits, 16, 64), 16)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    out, given, rest = empty_map(x, x.shape), as_map(x), None
    weight, bias = weight.contiguous(), bias.contiguous()
    if mean is None or variance is None:
        numbers = x.new_empty((3, x.shape[1]), dtype=torch.float32)
        near, rest, spread = numbers.unbind(0)
        returned = near, spread
        if x.numel():
            parts = _Splits(given)
            moments_kernel[parts.grid](
                given.tensor, parts.out, *parts.arguments, *given.strides, *tile_sizes(given)
            )
            join_moments_kernel[parts.join_grid](
                parts.out, near, rest, spread, *parts.arguments, x.shape[0], *parts.blocks
            )
        else:
            numbers.fill_(torch.nan)
    else:
        near, spread = mean.contiguous(), variance.contiguous()
        returned = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    if x.numel():
        channels, pixels, to = x.shape[1], x.shape[2] * x.shape[3], as_map(out)
        apply_kernel[map_grid(given)](
            given.tensor, to.tensor, weight, bias, near, rest, spread, eps, channels, pixels,
            *given.strides, *to.strides, activation == "gelu", *tile_sizes(given),
        )  # fmt: skip
    return out, *returned


def backward(
    grad_y: Tensor,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    measured: bool,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, given, g = empty_map(x, x.shape), as_map(x), as_map(grad_y)
    weight, bias, mean, variance = (t.contiguous() for t in (weight, bias, mean, variance))
    vectors = weight, bias, mean, variance
    grads = x.new_empty((6, x.shape[1]), dtype=torch.float32)
    numbers = grads[4:]
    if x.numel():
        to, gelu, parts = as_map(grad_x), activation == "gelu", _Splits(given)
        channels, pixels, _, splits = parts.arguments
        statistics = (None if t is None else t.contiguous() for t in (grad_mean, grad_variance))
        gradient_sums_kernel[parts.grid](
            given.tensor, g.tensor, parts.out, *vectors, eps, *parts.arguments, *given.strides, *g.strides,
            gelu, *tile_sizes(given),
        )  # fmt: skip
        join_gradients_kernel[parts.join_grid](
            parts.out, weight, variance, eps, *statistics, numbers, grads,
            channels, pixels, splits, x.shape[0], measured, *parts.blocks,
        )  # fmt: skip
        gradient_kernel[map_grid(given)](
            given.tensor, g.tensor, to.tensor, *vectors, eps, numbers, channels, pixels,
            *given.strides, *g.strides, *to.strides, gelu, measured, *tile_sizes(given),
        )  # fmt: skip
    else:
        grads.zero_()
    return (
        grad_x,
        grads[0].to(weight.dtype),
        grads[1].to(bias.dtype),
        grads[2].to(mean.dtype),
        grads[3].to(variance.dtype),
    )

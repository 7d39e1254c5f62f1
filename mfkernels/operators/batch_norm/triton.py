import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_map
from ..triton_maps import Map, as_map, splits_of, tile_sizes


@triton.jit
def load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p):
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = b * x_b + c.to(tl.int64)[:, None] * x_c + p.to(tl.int64)[None, :] * x_p
    return tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def moments_kernel(
    x, out, channels, pixels, split, splits, x_b, x_c, x_p, BC: tl.constexpr, BP: tl.constexpr
):
    """out (B, splits, 2, C): over a split's pixels the mean, and the sum of squared distances from it."""
    part, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
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


@triton.jit
def apply_kernel(
    x, out, numbers, channels, pixels, x_b, x_c, x_p, out_b, out_c, out_p,
    GELU: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) * scale + shift and its activation; numbers (3, C) are these three."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    b = tl.program_id(2).to(tl.int64)
    value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
    value = normal(value, numbers, c, channels)[1]
    if GELU:
        value = value * (0.5 * (1 + tl.erf(value * 0.7071067811865476)))
    store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p)


@triton.jit
def normal(value, numbers, c, channels):
    """The distances from the mean, and what is before the activation."""
    distance = value - tl.load(numbers + c, c < channels, 0.0)[:, None]
    scaled = distance * tl.load(numbers + channels + c, c < channels, 0.0)[:, None]
    return distance, scaled + tl.load(numbers + 2 * channels + c, c < channels, 0.0)[:, None]


@triton.jit
def store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p):
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = b * out_b + c.to(tl.int64)[:, None] * out_c + p.to(tl.int64)[None, :] * out_p
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def before_activation(grad, before, GELU: tl.constexpr):
    """The gradient before the activation."""
    if GELU:
        below = 0.5 * (1 + tl.erf(before * 0.7071067811865476))
        grad = grad * (below + before * tl.exp(-0.5 * before * before) * 0.3989422804014327)
    return grad


@triton.jit
def gradient_sums_kernel(
    x, g, out, numbers, channels, pixels, split, splits,
    x_b, x_c, x_p, g_b, g_c, g_p, GELU: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out (B, splits, 2, C): sums over a split's pixels of d, the gradient before the activation, and of
    d (x - mean)."""
    part, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * BC + tl.arange(0, BC)
    sums = tl.zeros([BC], tl.float32)
    products = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * split, pixels)
    for start in range(part * split, last, BP):
        p = start + tl.arange(0, BP)
        value = load_tile(x, b, c, p, channels, last, x_b, x_c, x_p)
        distance, before = normal(value, numbers, c, channels)
        grad = load_tile(g, b, c, p, channels, last, g_b, g_c, g_p)
        grad = before_activation(grad, before, GELU)
        sums += tl.sum(grad, 1)
        products += tl.sum(grad * distance, 1)
    to = out + (b * splits + part) * 2 * channels + c
    tl.store(to, sums, c < channels)
    tl.store(to + channels, products, c < channels)


@triton.jit
def gradient_kernel(
    x, g, out, numbers, channels, pixels,
    x_b, x_c, x_p, g_b, g_c, g_p, out_b, out_c, out_p,
    GELU: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out = d * scale + (x - mean) * slope + constant; numbers (5, C) end with the last two."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    b = tl.program_id(2).to(tl.int64)
    value = load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p)
    distance, before = normal(value, numbers, c, channels)
    grad = load_tile(g, b, c, p, channels, pixels, g_b, g_c, g_p)
    grad = before_activation(grad, before, GELU)
    inside = c < channels
    value = grad * tl.load(numbers + channels + c, inside, 0.0)[:, None]
    value += distance * tl.load(numbers + 3 * channels + c, inside, 0.0)[:, None]
    value += tl.load(numbers + 4 * channels + c, inside, 0.0)[:, None]
    store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p)


class _Splits:
    """The pixels of a map in parts, which are summed by programs of their own."""

    def __init__(self, x: Map) -> None:
        batch, self.channels, height, width = x.tensor.shape
        self.pixels, (block_c, block_p) = height * width, tile_sizes(x)
        groups = triton.cdiv(self.channels, block_c)
        self.count, self.size = splits_of(self.pixels, batch * groups, x.tensor.device, block_p)
        self.grid = (self.count, groups, batch)
        self.out = x.tensor.new_empty((batch, self.count, 2, self.channels), dtype=torch.float32)
        if x.tensor.numel() == 0:  # no program will run
            self.out.zero_()
        self.arguments = (self.channels, self.pixels, self.size, self.count)

    def totals(self) -> Tensor:
        """Sums over everything, (2, C)."""
        return self.out.double().sum((0, 1))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all parts together, from those of each."""
        ends = torch.arange(1, self.count + 1, device=self.out.device) * self.size
        sizes = (ends.clamp(max=self.pixels) - ends + self.size).double()[None, :, None]
        means, squares = self.out.double().unbind(2)
        count = self.out.shape[0] * self.pixels
        mean = (means * sizes).sum((0, 1)) / count
        spread = (means - mean).square() * sizes
        return mean, (squares + spread).sum((0, 1)) / count


def _grid(x: Map) -> tuple[int, int, int]:
    batch, channels, height, width = x.tensor.shape
    block_c, block_p = tile_sizes(x)
    return triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch


def _factors(weight: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1 / deviation, and the factor of the distances from the mean; in float64."""
    inverse = (variance.double() + eps).rsqrt()
    return inverse, weight.double() * inverse


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    out, given = empty_map(x, x.shape), as_map(x)
    measured = mean is None
    if mean is None or variance is None:
        splits = _Splits(given)
        if x.numel():
            moments_kernel[splits.grid](
                given.tensor, splits.out, *splits.arguments, *given.strides, *tile_sizes(given)
            )
        mean, variance = splits.moments()
    _, scale = _factors(weight, variance, eps)
    near = mean.float()
    # What rounding the mean leaves off is in the summand.
    shift = bias.double() + (near.double() - mean.double()) * scale
    if x.numel():
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        to = as_map(out)
        apply_kernel[_grid(given)](
            given.tensor, to.tensor, torch.stack([near, scale.float(), shift.float()]), channels, pixels,
            *given.strides, *to.strides, activation == "gelu", *tile_sizes(given),
        )  # fmt: skip
    empty = near.new_empty(0)
    return (out, near, variance.float()) if measured else (out, empty, empty.clone())


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
    gelu, count = activation == "gelu", x.shape[0] * x.shape[2] * x.shape[3]
    inverse, scale = _factors(weight, variance, eps)
    numbers = torch.zeros((5, x.shape[1]), dtype=torch.float32, device=x.device)
    numbers[0], numbers[1], numbers[2] = mean, scale, bias
    splits = _Splits(given)
    if x.numel():
        gradient_sums_kernel[splits.grid](
            given.tensor, g.tensor, splits.out, numbers, *splits.arguments, *given.strides, *g.strides,
            gelu, *tile_sizes(given),
        )  # fmt: skip
    sums, products = splits.totals()
    if measured:
        through = -scale * inverse.square() * products
        numbers[3] = (through if grad_variance is None else through + 2 * grad_variance.double()) / count
        constant = -scale * sums
        numbers[4] = (constant if grad_mean is None else constant + grad_mean.double()) / count
    if x.numel():
        to = as_map(grad_x)
        gradient_kernel[_grid(given)](
            given.tensor, g.tensor, to.tensor, numbers, x.shape[1], x.shape[2] * x.shape[3],
            *given.strides, *g.strides, *to.strides, gelu, *tile_sizes(given),
        )  # fmt: skip
    return (
        grad_x,
        (inverse * products).to(weight.dtype),
        sums.to(bias.dtype),
        (-scale * sums).to(mean.dtype),
        (-0.5 * scale * inverse.square() * products).to(variance.dtype),
    )

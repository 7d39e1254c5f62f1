"""Share among Triton kernels how they see feature maps, and which block sizes they take."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import triton_interpreted


class Map(NamedTuple):
    """A tensor (B, C, H, W) whose pixels lie in one run."""

    tensor: Tensor
    strides: tuple[int, int, int]  # of sample, channel, pixel


def as_map(x: Tensor) -> Map:
    """Return the tensor itself, or a copy where its rows do not follow one another."""
    _, channels, height, width = x.shape
    one_run = height <= 1 or width <= 1 or x.stride(2) == width * x.stride(3)
    if not one_run:
        last = channels > 1 and x.stride(1) == 1
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return Map(x, (x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2)))


# Triton makes a constant of a number that is 1, and another variant of a kernel where 16 divides a number. Of
# these kinds of numbers kernels gain nothing by it: they do not decide how wide memory is read.
COUNTS = ["batch", "functions", "groups", "heads", "kernels", "splits", "tokens"]


@triton.jit
def place(first, second):
    """Return where this program is along three axes of `first`, `second` and any number of programs.

    They are folded into one, since a GPU takes no more than 65535 programs along the others of its own.
    """
    at = tl.program_id(0)
    return at % first, at // first % second, (at // first // second).to(tl.int64)


@triton.jit
def load_tile(x, b, c, p, channels, pixels, x_b, x_c, x_p):
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = b * x_b + c.to(tl.int64)[:, None] * x_c + p.to(tl.int64)[None, :] * x_p
    return tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def store_tile(out, value, b, c, p, channels, pixels, out_b, out_c, out_p):
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = b * out_b + c.to(tl.int64)[:, None] * out_c + p.to(tl.int64)[None, :] * out_p
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def load_vector(vector, c, channels, other):
    """Numbers of channels c in float64; `other` beyond the last.

    The interpreter converts bfloat16 to float32 alone.
    """
    return tl.load(vector + c, c < channels, other).to(tl.float32).to(tl.float64)


@triton.jit
def gelu(x):
    """Return the exact one, of float32."""
    return x * (0.5 * (1 + tl.erf(x * 0.7071067811865476)))


def power(n: int, least: int = 1, most: int = 1 << 20) -> int:
    """Return the next power of two, within these bounds."""
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


# The interpreter has no products in bfloat16, and rounds to it towards zero.
INTERPRETED = tl.constexpr(triton_interpreted())


@triton.jit
def dot(a, b):
    """Multiply a b in float32, with a rounded to b's dtype.

    Where that is half precision, tensor cores do it.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def rounded(x, like):
    """Return x in the dtype of `like`, for such a product."""
    if INTERPRETED:
        return x
    return x.to(like.dtype)


@triton.jit
def add_to_mean(weights, grads, largest, pivot, weight_sum, sums, BP: tl.constexpr):
    """Add (rows, BP) weights and their gradients to what a softmax's backward keeps of each row.

    It keeps the largest weight, its gradient (the pivot), the sum of the weights and that of weights *
    (gradients - pivot). Where one weight is nearly one, the mean of the gradients is nearly its own, and
    without the pivot their difference would lose its digits.
    """
    here = tl.max(weights, 1)
    first = tl.min(tl.where(weights == here[:, None], tl.arange(0, BP)[None, :], BP), 1)
    own = tl.sum(tl.where(tl.arange(0, BP)[None, :] == first[:, None], grads, 0.0), 1)
    higher = tl.where(here > largest, own, pivot)
    sums += weight_sum * (pivot - higher) + tl.sum(weights * (grads - higher[:, None]), 1)
    return tl.maximum(largest, here), higher, weight_sum + tl.sum(weights, 1), sums


def head_sizes(x: Tensor, tokens: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """Of the cross attentions: pixels, tokens, heads, channels of a head."""
    return x.shape[2] * x.shape[3], tokens.shape[1], num_heads, x.shape[1] // num_heads


def in_rows(tokens: Tensor) -> Tensor:
    """Return the tensor itself, or a copy where the numbers of a token (B, T, C) do not lie in one run."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def head_blocks(tokens: int, depth: int) -> dict[str, int]:
    """Return sizes of the products' tiles, at least 16 a side, that stay in registers.

    Where heads are deep or tokens many, tiles have fewer pixels and more threads.
    """
    block_m, block_d = power(tokens, 16), power(depth, 16)
    pixels, warps = {16: (64, 4), 32: (32, 4), 64: (32, 8)}.get(max(block_m, block_d), (16, 8))
    return dict(BM=block_m, BD=block_d, BP=pixels, num_warps=warps)


def tile_sizes(x: Map) -> tuple[int, int]:
    """Channels and pixels of a tile of work on single numbers: long in the direction in which memory is."""
    return (64, 16) if x.strides[1] == 1 and x.strides[2] != 1 else (4, 256)


def map_grid(x: Map) -> tuple[int]:
    """Return a grid with a program for each tile of a map."""
    batch, channels, height, width = x.tensor.shape
    block_c, block_p = tile_sizes(x)
    return (triton.cdiv(height * width, block_p) * triton.cdiv(channels, block_c) * batch,)


def splits_of(pixels: int, batches: int, device: torch.device, block: int) -> tuple[int, int]:
    """Return the number of parts in which pixels are summed, enough for the device, and a part's pixels."""
    wanted = 1
    if device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, programs // max(batches, 1))
    size = -(-max(pixels, 1) // wanted)
    size = max(block, -(-size // block) * block)
    return -(-max(pixels, 1) // size), size

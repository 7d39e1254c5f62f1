"""What the Triton kernels share: how they see feature maps, and which block sizes they take."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Map(NamedTuple):
    """A tensor (B, C, H, W) whose pixels lie in one run."""

    tensor: Tensor
    strides: tuple[int, int, int]  # of sample, channel, pixel


def as_map(x: Tensor) -> Map:
    """The tensor itself, or a copy where its rows do not follow one another."""
    _, channels, height, width = x.shape
    one_run = height <= 1 or width <= 1 or x.stride(2) == width * x.stride(3)
    if not one_run:
        last = channels > 1 and x.stride(1) == 1
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return Map(x, (x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2)))


def power(n: int, least: int = 1, most: int = 1 << 20) -> int:
    """The next power of two, within these bounds."""
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


def splits_of(pixels: int, batches: int, device: torch.device, block: int) -> tuple[int, int]:
    """How many parts the pixels are summed in, and pixels of a part: enough programs for the device."""
    wanted = 1
    if device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, programs // max(batches, 1))
    size = -(-max(pixels, 1) // wanted)
    size = max(block, -(-size // block) * block)
    return -(-max(pixels, 1) // size), size

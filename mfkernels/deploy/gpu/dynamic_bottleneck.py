"""Mobile of a Mobile-Former block: one kernel on a GPU, in half precision."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...nn.mobile_former_block import MobileFormerBlock
from ...operators.dynamic_relu import dynamic_relu_reference
from ...operators.former_to_mobile_attention import former_to_mobile_attention_reference
from ..folding import folded
from .activated_depthwise import activated_depthwise_of

MOST_OUTPUTS, MOST_TOKENS, TILE = 256, 8, 8  # of the kernel


def dynamic_bottleneck_reference(
    x: Tensor,
    slopes1: Tensor,
    slopes2: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    skip: bool,
) -> Tensor:
    """Define `torch.ops.mfkernels_cuda.dynamic_bottleneck` in plain PyTorch.

    It is 1x1 convolution, dynamic ReLU, 3x3 depthwise convolution, dynamic ReLU, 1x1 convolution, and the
    bridge from the tokens.

    Args:
        x: (B, C, H, W).
        slopes1, slopes2: (B, 2, E), of the dynamic ReLUs, see `mfkernels.ops.dynamic_relu`.
        expand_weight: (E, C, 1, 1).
        expand_bias: (E,).
        depthwise_weight: (E, 1, 3, 3).
        depthwise_bias: (E,).
        project_weight: (O, E, 1, 1); the kernel takes at most `MOST_OUTPUTS`.
        project_bias: (O,).
        keys, values, num_heads: (B, T, O), of `mfkernels.ops.former_to_mobile_attention`; the kernel takes at
            most `MOST_TOKENS`.
        skip: x is added before the bridge; O = C.

    Returns:
        (B, O, H, W).

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2.
    """
    hidden = dynamic_relu_reference(F.conv2d(x, expand_weight, expand_bias), slopes1)
    channels = len(depthwise_weight)
    hidden = F.conv2d(hidden, depthwise_weight, depthwise_bias, padding=1, groups=channels)
    out = F.conv2d(dynamic_relu_reference(hidden, slopes2), project_weight, project_bias)
    return former_to_mobile_attention_reference(out + x if skip else out, keys, values, num_heads)


def dynamic_bottleneck(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    run: Any = dynamic_bottleneck_reference
    return (torch.ops.mfkernels_cuda.dynamic_bottleneck if arguments[0].is_cuda else run)(*arguments)


def occupies_device(x: Tensor) -> bool:
    """Return whether a map has tiles for at least half of the multiprocessors.

    Each multiprocessor computes a tile. If there are fewer tiles, all hidden channels keep them busy for
    longer than the library's convolutions take.
    """
    if not x.is_cuda:
        return True
    tiles = x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)
    return 2 * tiles >= torch.cuda.get_device_properties(x.device).multi_processor_count


def is_bottleneck(block: Any) -> bool:
    """Whether the kernel does what Mobile of the block does: a released one, with its batch norms folded."""
    if not isinstance(block, MobileFormerBlock) or activated_depthwise_of(block) is None:
        return False
    if (block.act1.num_functions, block.act2.num_functions) != (2, 2):
        return False
    if block.global_local.token_num > MOST_TOKENS:
        return False
    layers: list[Any] = [block.conv1, block.conv3]
    first, last = map(folded, layers)
    if first is None or last is None:
        return False
    return first.groups == last.groups == 1 and last.out_channels <= MOST_OUTPUTS

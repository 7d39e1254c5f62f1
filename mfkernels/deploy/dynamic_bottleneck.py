"""Mobile-Former blocks whose Mobile is one kernel on a GPU, in half precision."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.mobile_former import MobileFormer
from ..native import CUDA_LACKS
from ..nn.inputs import Pair
from ..nn.mobile_former_block import MobileFormerBlock
from ..operators.dynamic_relu import dynamic_relu_reference

MOST_OUTPUTS = 256  # of the kernel


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
    skip: bool,
) -> Tensor:
    """Plain-PyTorch definition of `torch.ops.mfkernels_cuda.dynamic_bottleneck`: 1x1 convolution, dynamic
    ReLU, 3x3 depthwise convolution, dynamic ReLU, 1x1 convolution.

    Args:
        x: (B, C, H, W).
        slopes1, slopes2: (B, 2, E), of the dynamic ReLUs, see `mfkernels.ops.dynamic_relu`.
        expand_weight: (E, C, 1, 1).
        expand_bias: (E,).
        depthwise_weight: (E, 1, 3, 3).
        depthwise_bias: (E,).
        project_weight: (O, E, 1, 1); the kernel takes at most `MOST_OUTPUTS`.
        project_bias: (O,).
        skip: x is added; O = C.

    Returns:
        (B, O, H, W).

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2.
    """
    hidden = dynamic_relu_reference(F.conv2d(x, expand_weight, expand_bias), slopes1)
    channels = len(depthwise_weight)
    hidden = F.conv2d(hidden, depthwise_weight, depthwise_bias, padding=1, groups=channels)
    out = F.conv2d(dynamic_relu_reference(hidden, slopes2), project_weight, project_bias)
    return out + x if skip else out


class FusedBlock(nn.Module):
    """A `MobileFormerBlock` that makes its coefficients first and then all of Mobile at once: the wide maps
    stay on the chip, but Former runs beside nothing.

    Args:
        block: one that `fits`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, pair: Pair) -> Pair:
        block: Any = self.block
        x, tokens = pair
        tokens, _ = block.local_global(x, tokens, return_logits=False)
        tokens = block.global_block(tokens)
        layers = [layers[0] for layers in (block.conv1, block.conv2, block.conv3)]
        parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        run: Any = torch.ops.mfkernels_cuda.dynamic_bottleneck if x.is_cuda else dynamic_bottleneck_reference
        out = run(x, *block._slopes(tokens), *parameters, block.skip)
        return block.global_local(out, tokens), tokens


def fits(block: nn.Module) -> bool:
    """Whether the kernel does what the block does: a released one, with its batch norms folded."""
    if not isinstance(block, MobileFormerBlock) or block.before_skip or block.token_id < 0:
        return False
    if (block.act1.num_functions, block.act2.num_functions, block.act3.num_functions) != (2, 2, -1):
        return False
    convolutions: tuple[Any, ...] = block.conv1, block.conv2, block.conv3
    for layers in convolutions:
        rest = list(layers)[1:]
        if type(layers[0]) is not nn.Conv2d or any(type(layer) is not nn.Identity for layer in rest):
            return False
    first, depthwise, last = (layers[0] for layers in convolutions)
    plain = (
        depthwise.kernel_size == (3, 3) and depthwise.stride == (1, 1) and first.groups == last.groups == 1
    )
    return plain and last.out_channels <= MOST_OUTPUTS


def with_fused_blocks(model: nn.Module) -> nn.Module | None:
    """The network with `FusedBlock`s, on the same parameters; None where it has no block that fits."""
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    model, found = copy.deepcopy(model, shared), False
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if fits(block):
                setattr(parent, name, FusedBlock(block))
                found = True
    return model if found else None


def forms(model: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """The network as it is, and with fused blocks where there is a kernel: which one is faster is to be found
    where it runs."""
    fused = None
    if CUDA_LACKS is None and dtype != torch.float32 and isinstance(model, MobileFormer):
        fused = with_fused_blocks(model)
    return [model] if fused is None else [model, fused]

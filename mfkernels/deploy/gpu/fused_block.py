"""Mobile-Former blocks in few kernels on a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...models.dynamic_mobile_former import DynamicMobileFormer
from ...models.mobile_former import MobileFormer
from ...native import CUDA_LACKS
from ...nn.inputs import Pair
from ...nn.mobile_former_block import MobileFormerBlock, MobileFormerDownsample
from ...operators.dispatch import TRITON_INSTALLED
from ...streams import side_by_side
from .activated_depthwise import activated_depthwise, activated_depthwise_of
from .dynamic_bottleneck import dynamic_bottleneck, is_bottleneck, occupies_device
from .fused_dmf_block import with_fused_dmf_blocks
from .token_chain import Made, TokenChain, is_chain, token_chain_reference


class FusedBlock(nn.Module):
    """Run a block of a Mobile-Former in few kernels.

    One kernel does all that concerns tokens alone, beside Mobile's first convolution; another is a depthwise
    convolution with the dynamic ReLUs around it. Where maps are large, all of Mobile is one kernel, and wide
    maps stay on the chip.

    Args:
        block: one that `is_chain`.
        whole: Mobile may be one kernel; the block `is_bottleneck`, too.
    """

    def __init__(self, block: nn.Module, whole: bool) -> None:
        super().__init__()
        self.block, self.whole = block, whole
        self.chain = TokenChain(block) if CUDA_LACKS is None else None

    def forward(self, pair: Pair) -> Pair:
        block: Any = self.block
        x, tokens = pair
        heads = block.global_local.num_heads
        if self.whole and occupies_device(x):
            made = self._tokens(x, tokens)
            layers = [layers[0] for layers in (block.conv1, block.conv2, block.conv3)]
            weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
            slopes, bridge = (made.slopes1, made.slopes2), (made.keys, made.values, heads)
            return dynamic_bottleneck(x, *slopes, *weights, *bridge, block.skip), made.tokens

        def back(out: Tensor) -> Tensor:
            return ops.former_to_mobile_attention(out, made.keys, made.values, heads)

        made, first = side_by_side(lambda: self._tokens(x, tokens), lambda: block.conv1(x), x, tokens)
        slopes = made.slopes1, made.slopes2
        conv = activated_depthwise_of(block) if TRITON_INSTALLED else None
        if conv is None:
            return block._mobile(x, first, made.tokens, None, slopes, back, padding=None), made.tokens
        return self._mobile(x, first, conv, *slopes, back), made.tokens

    def _mobile(
        self,
        x: Tensor,
        first: Tensor,
        conv: nn.Conv2d,
        slopes1: Tensor,
        slopes2: Tensor,
        back: Callable[[Tensor], Tensor],
    ) -> Tensor:
        block: Any = self.block
        weights = conv.weight, conv.bias, slopes2
        if isinstance(block, MobileFormerBlock):
            out = block.conv3(activated_depthwise(first, slopes1, *weights))
            return back(out + x if block.skip else out)
        middle = block.conv2(ops.dynamic_relu(first, slopes1))
        out = back(block.conv4(activated_depthwise(middle, None, *weights)) + middle)
        return out + x if block.skip else out

    def _tokens(self, x: Tensor, tokens: Tensor) -> Made:
        bridge: Any = self.block.local_global
        q = bridge.q(tokens).transpose(0, 1)
        gathered = ops.mobile_to_former_attention(x, q, bridge.num_heads)
        if self.chain is not None and x.is_cuda:
            return self.chain(tokens, gathered)
        return token_chain_reference(self.block, tokens, gathered)  # type: ignore[arg-type]


def with_fused_blocks(model: nn.Module, whole: bool) -> nn.Module | None:
    """Return the network with `FusedBlock`s, on the same parameters; None where no block can be one.

    Args:
        model: its batch norms are folded.
        whole: where they can, blocks have all of Mobile in one kernel.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    model, found = copy.deepcopy(model, shared), False
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, MobileFormerBlock | MobileFormerDownsample) and is_chain(block):
                setattr(parent, name, FusedBlock(block, whole and is_bottleneck(block)))
                found = True
    return model if found else None


def forms(model: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Return the network as it is, and with fused blocks where there are kernels.

    The caller finds out which form is the fastest where it runs.
    """
    if isinstance(model, DynamicMobileFormer) and TRITON_INSTALLED:
        fused_dmf = with_fused_dmf_blocks(model)
        return [model] if fused_dmf is None else [model, fused_dmf]
    kernels = CUDA_LACKS is None
    if not isinstance(model, MobileFormer) or not (kernels or TRITON_INSTALLED):
        return [model]
    ways = (False, True) if kernels and dtype != torch.float32 else (False,)
    fused = [with_fused_blocks(model, whole) for whole in ways]
    return [model, *(form for form in fused if form is not None)]

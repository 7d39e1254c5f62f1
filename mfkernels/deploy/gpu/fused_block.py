"""Mobile-Former blocks in few kernels on a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...checks import tensors_in
from ...models.dynamic_mobile_former import DynamicMobileFormer
from ...models.iformer import IFormer
from ...models.mobile_former import MobileFormer
from ...native import CUDA_LACKS
from ...nn.mobile_former_block import MobileFormerBlock, MobileFormerDownsample
from ...operators.dispatch import TRITON_INSTALLED
from ...streams import side_by_side
from .activated_depthwise import activated_depthwise, activated_depthwise_of
from .dynamic_bottleneck import dynamic_bottleneck, is_bottleneck, occupies_device
from .former_to_mobile import former_to_mobile
from .fused_dmf_block import with_fused_dmf_blocks
from .fused_iformer import with_pointwise_kernels
from .token_chain import Made, TokenChain, is_chain, token_chain_reference
from .token_steps import LastBridge, TokenSteps, is_bridge


class FusedBlock(nn.Module):
    """Run a block of a Mobile-Former in few kernels.

    One or two kernels do all that concerns tokens alone, beside Mobile's first convolution; another is a
    depthwise convolution with the dynamic ReLUs around it. Where maps are large, all of Mobile is one kernel,
    and wide maps stay on the chip.

    Args:
        block: one that `is_chain`.
        whole: Mobile may be one kernel; the block `is_bottleneck`, too.
        chain: what concerns tokens alone: a `TokenChain` or `TokenSteps`.
    """

    def __init__(self, block: nn.Module, whole: bool, chain: nn.Module) -> None:
        super().__init__()
        self.block, self.whole, self.chain = block, whole, chain

    def forward(self, pair: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        block: Any = self.block
        x, tokens = pair
        heads = block.global_local.num_heads
        if self.whole and occupies_device(x):
            made, following = self._tokens(x, tokens)
            layers = [layers[0] for layers in (block.conv1, block.conv2, block.conv3)]
            weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
            slopes, bridge = (made.slopes1, made.slopes2), (made.keys, made.values, heads)
            return dynamic_bottleneck(x, *slopes, *weights, *bridge, block.skip), following

        def back(out: Tensor, residual: Tensor | None = None) -> Tensor:
            return former_to_mobile(out, residual, made.keys, made.values, heads)

        (made, following), first = side_by_side(
            lambda: self._tokens(x, tokens), lambda: block.conv1(x), x, *tensors_in(tokens)
        )
        slopes = made.slopes1, made.slopes2
        conv = activated_depthwise_of(block) if TRITON_INSTALLED else None
        if conv is None:
            return block._mobile(x, first, made.tokens, None, slopes, back, padding=None), following
        return self._mobile(x, first, conv, *slopes, back), following

    def _mobile(
        self,
        x: Tensor,
        first: Tensor,
        conv: nn.Conv2d,
        slopes1: Tensor,
        slopes2: Tensor,
        back: Callable[..., Tensor],
    ) -> Tensor:
        block: Any = self.block
        weights = conv.weight, conv.bias, slopes2
        if isinstance(block, MobileFormerBlock):
            out = block.conv3(activated_depthwise(first, slopes1, *weights))
            return back(out, x if block.skip else None)
        middle = block.conv2(ops.dynamic_relu(first, slopes1))
        out = back(block.conv4(activated_depthwise(middle, None, *weights)), middle)
        return out + x if block.skip else out

    def _tokens(self, x: Tensor, tokens: Any) -> tuple[Made, Any]:
        if isinstance(self.chain, TokenSteps):
            return self.chain(self.block, x, tokens)
        bridge: Any = self.block.local_global
        q = bridge.q(tokens).transpose(0, 1)
        gathered: Any = ops.mobile_to_former_attention(x, q, bridge.num_heads)
        made = (
            self.chain(tokens, gathered) if x.is_cuda else token_chain_reference(self.block, tokens, gathered)
        )
        return made, made.tokens


def with_fused_blocks(model: nn.Module, whole: bool, in_steps: bool) -> nn.Module | None:
    """Return the network with `FusedBlock`s, on the same parameters; None where no block can be one.

    Args:
        model: its batch norms are folded.
        whole: where they can, blocks have all of Mobile in one kernel.
        in_steps: they have `TokenSteps`, else a `TokenChain`.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    fused: Any = copy.deepcopy(model, shared)
    blocks = [*fused.features]
    kinds = (MobileFormerBlock, MobileFormerDownsample)
    chains = [isinstance(block, kinds) and is_chain(block) for block in blocks]
    for i, block in enumerate(blocks):
        if not chains[i]:
            continue
        if in_steps and i + 1 == len(blocks) and is_bridge(fused.local_global):
            following = fused.local_global
            fused.local_global = LastBridge(following)
        else:
            following = blocks[i + 1].local_global if chains[i + 1 : i + 2] == [True] else None
        chain = TokenSteps(following) if in_steps else TokenChain(block)
        fused.features[i] = FusedBlock(block, whole and is_bottleneck(block), chain)
    return fused if any(chains) else None


def forms(model: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Return the network as it is, and with fused blocks where there are kernels.

    The caller finds out which form is the fastest where it runs.
    """
    kernels, fused = CUDA_LACKS is None, []
    if isinstance(model, MobileFormer):
        ways = [(False, True)] * TRITON_INSTALLED + [(False, False)] * kernels
        ways += [(True, False)] * (kernels and dtype != torch.float32)
        fused = [with_fused_blocks(model, *way) for way in ways]
    elif isinstance(model, DynamicMobileFormer) and TRITON_INSTALLED:
        fused = [with_fused_dmf_blocks(model, pointwise) for pointwise in (False, True)]
    elif isinstance(model, IFormer) and TRITON_INSTALLED:
        fused = [with_pointwise_kernels(model)]
    return [model, *(form for form in fused if form is not None)]

"""What a Mobile-Former block does with its tokens alone: two Triton kernels on a GPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...nn.inputs import parameters_of
from ...operators.former_block import former_block_reference
from ...operators.token_hyper import token_hyper_reference
from .by_kernel import by_kernel
from .token_chain import Made


def update_tokens_reference(
    gathered: Tensor,
    gates: Tensor | None,
    tokens: Tensor,
    layers: Sequence[Tensor],
    num_heads: int,
    eps: float,
) -> Tensor:
    """Define the first Triton kernel in plain PyTorch: the end of the bridge to the tokens, and the Former.

    Args:
        gathered: (B, T, C), what the tokens took from the map.
        gates: (B, T, C), or None.
        tokens: (B, T, d).
        layers: weights and biases of the bridge's projection and norm, and of the Former's layers, in the
            order of `mfkernels.ops.former_block`.
        num_heads, eps: of `mfkernels.ops.former_block`.

    Returns:
        (B, T, d).

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2.
    """
    weight, bias, norm_weight, norm_bias, *former = layers
    given = gathered if gates is None else gathered * gates
    tokens = tokens + F.linear(given, weight, bias)
    tokens = F.layer_norm(tokens, tokens.shape[2:], norm_weight, norm_bias, eps)
    run: Any = former_block_reference
    return run(tokens, *former, num_heads=num_heads, eps=eps)


def outputs_of_tokens_reference(
    tokens: Tensor, token_id: int, networks: Sequence[Tensor], layers: Sequence[Tensor]
) -> list[Tensor]:
    """Define the second Triton kernel in plain PyTorch: all that follows from the tokens.

    Args:
        tokens: (B, T, d).
        token_id: the token that drives dynamic ReLUs.
        networks: weights and biases of two hyper networks, as of `mfkernels.ops.token_hyper`.
        layers: weights (n, d) and biases (n,) of up to four linear layers: of keys, values and queries, and
            of gates, 2 hardsigmoid of the layer.

    Returns:
        The slopes (B, 2, E) of both networks, and (B, T, n) of each layer.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2 and equation 3.
    """
    parameters: Any = networks
    slopes = token_hyper_reference(tokens[:, token_id], *parameters)
    outs = [F.linear(tokens, weight, bias) for weight, bias in zip(layers[::2], layers[1::2], strict=True)]
    return [*slopes, *outs[:3], *(F.relu6(gate + 3) / 3 for gate in outs[3:])]


def update_tokens(*arguments: Any) -> Tensor:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("token_steps_triton", update_tokens_reference, *arguments)


def outputs_of_tokens(*arguments: Any) -> list[Tensor]:
    """By the kernel, or on a CPU by its definition."""
    return by_kernel("token_steps_triton", outputs_of_tokens_reference, *arguments)


class Given(NamedTuple):
    """Hold the tokens (B, T, d), and what the block before makes of them for the bridge of the next one.

    These are the queries (B, T, C) and, where it has them, the gates (B, T, C).
    """

    tokens: Tensor
    queries: Tensor
    gates: Tensor | None


class TokenSteps(nn.Module):
    """Runs both kernels for one block.

    Args:
        following: the next block, if there is one.

    Inputs:
        block: one that `is_chain`.
        x: (B, C, H, W).
        given: tokens (T, B, d), or what the block before gave.

    Returns:
        `Made`, and what the next block is given.
    """

    def __init__(self, following: Any | None) -> None:
        super().__init__()
        self.following = nn.ModuleList()
        if following is not None:
            bridge = following.local_global
            self.following.extend([bridge.q, *([bridge.alpha[0]] if hasattr(bridge, "alpha") else [])])

    def forward(self, block: Any, x: Tensor, given: Tensor | Given) -> tuple[Made, Tensor | Given]:
        bridge, former, back = block.local_global, block.global_block, block.global_local
        tokens, queries, gates = _first(bridge, given) if isinstance(given, Tensor) else given
        gathered = ops.mobile_to_former_attention(x, queries, bridge.num_heads)
        layers: Any = parameters_of(bridge.proj, bridge.layer_norm, *former._layers())
        tokens = update_tokens(gathered, gates, tokens, layers, former.num_heads, former.layer_norm.eps)
        networks = [hyper.hyper[i] for _, hyper in block._generators() for i in (0, 2)]
        parameters = parameters_of(*networks), parameters_of(back.k, back.proj, *self.following)
        outputs = outputs_of_tokens(tokens, block.token_id, *parameters)
        made, rest = Made(tokens.transpose(0, 1), *outputs[:4]), outputs[4:]
        if not rest:
            return made, made.tokens.contiguous()
        return made, Given(tokens, rest[0], rest[1] if len(rest) > 1 else None)


def _first(bridge: Any, tokens: Tensor) -> Given:
    tokens = tokens.transpose(0, 1).contiguous()
    gates = 2 * bridge.alpha(tokens) if hasattr(bridge, "alpha") else None
    return Given(tokens, bridge.q(tokens), gates)

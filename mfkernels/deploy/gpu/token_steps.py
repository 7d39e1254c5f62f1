"""What a Mobile-Former block does with its tokens alone: two Triton kernels on a GPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...nn import MobileToFormer
from ...nn.inputs import parameters_of, untouched
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
            order of `mfkernels.ops.former_block`, if there is a Former.
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
    return tokens if not former else run(tokens, *former, num_heads=num_heads, eps=eps)


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
        following: the bridge to the tokens of the next block, or of the network's end, if there is one.

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
            gates = [following.alpha[0]] if hasattr(following, "alpha") else []
            self.following.extend([following.q, *gates])

    def forward(self, block: Any, x: Tensor, given: Tensor | Given) -> tuple[Made, Tensor | Given]:
        back = block.global_local
        tokens = _updated(block.local_global, block.global_block, x, given)
        networks = [hyper.hyper[i] for _, hyper in block._generators() for i in (0, 2)]
        parameters = parameters_of(*networks), parameters_of(back.k, back.proj, *self.following)
        outputs = outputs_of_tokens(tokens, block.token_id, *parameters)
        made, rest = Made(tokens.transpose(0, 1), *outputs[:4]), outputs[4:]
        if not rest:
            return made, made.tokens.contiguous()
        return made, Given(tokens, rest[0], rest[1] if len(rest) > 1 else None)


class LastBridge(nn.Module):
    """Stand in the place of the bridge at the end of a network, which is given tokens and queries.

    Args:
        bridge: one that `is_bridge`.

    Inputs:
        x (B, C, H, W), and what the block before gave.

    Returns:
        tokens (T, B, d), and None.
    """

    def __init__(self, bridge: nn.Module) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, x: Tensor, given: Given, return_logits: bool = False) -> tuple[Tensor, None]:
        return _updated(self.bridge, None, x, given).transpose(0, 1), None


def is_bridge(bridge: Any) -> bool:
    """Whether the first kernel does what a bridge to the tokens does: as in the released networks."""
    if not untouched(bridge, MobileToFormer) or any(hasattr(bridge, name) for name in ("mlp", "k")):
        return False
    layers: list[Any] = [bridge.q, bridge.proj, bridge.layer_norm]
    layers += list(bridge.alpha)[:1] if hasattr(bridge, "alpha") else []
    return parameters_of(*layers) is not None


def _updated(bridge: Any, former: Any | None, x: Tensor, given: Tensor | Given) -> Tensor:
    """Return the tokens (B, T, d) after the bridge to them, and the Former if there is one."""
    tokens, queries, gates = _first(bridge, given) if isinstance(given, Tensor) else given
    gathered = ops.mobile_to_former_attention(x, queries, bridge.num_heads)
    parts = [bridge.proj, bridge.layer_norm, *([] if former is None else former._layers())]
    heads = 1 if former is None else former.num_heads
    return update_tokens(gathered, gates, tokens, parameters_of(*parts), heads, bridge.layer_norm.eps)


def _first(bridge: Any, tokens: Tensor) -> Given:
    tokens = tokens.transpose(0, 1).contiguous()
    gates = 2 * bridge.alpha(tokens) if hasattr(bridge, "alpha") else None
    return Given(tokens, bridge.q(tokens), gates)

"""What a Mobile-Former block does with its tokens alone: one kernel on a GPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.inputs import parameters_of

ALIGNED = 8  # numbers: a vector of half precision


class Made(NamedTuple):
    """Hold T new tokens (T, B, d), and what follows from them.

    These are the coefficients (B, 2, E) of both dynamic ReLUs, and the keys and values (B, T, O) of the
    bridge to Mobile.
    """

    tokens: Tensor
    slopes1: Tensor
    slopes2: Tensor
    keys: Tensor
    values: Tensor


def token_chain_reference(block: Any, tokens: Tensor, gathered: Tensor) -> Made:
    """Plain-PyTorch definition of `torch.ops.mfkernels_cuda.token_chain`, by the block's own layers.

    Args:
        block: one that `is_chain`.
        tokens: (T, B, d).
        gathered: (B, T, C), what they took from the map.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2.
    """
    bridge, back = block.local_global, block.global_local
    given = gathered.transpose(0, 1)
    if hasattr(bridge, "alpha"):
        given = given * (2 * bridge.alpha(tokens))
    tokens = block.global_block(bridge.layer_norm(tokens + bridge.proj(given)))
    return Made(tokens, *block._slopes(tokens), *(f(tokens).transpose(0, 1) for f in (back.k, back.proj)))


def is_chain(block: Any) -> bool:
    """Whether the kernel does what the block does: as in the released networks."""
    bridge, former, back = block.local_global, block.global_block, block.global_local
    generators = block._generators()
    if block.token_id < 0 or any(act.num_functions != 2 for act, _ in generators):
        return False
    if hasattr(bridge, "mlp") or hasattr(bridge, "k") or not former._layers():
        return False
    if not hasattr(back, "k") or any(hasattr(back, name) for name in ("alpha", "mlp", "q")):
        return False
    hypers = [hyper.hyper[i] for _, hyper in generators for i in (0, 2)]
    layers = [bridge.q, bridge.proj, bridge.layer_norm, *former._layers(), *hypers, back.k, back.proj]
    if hasattr(bridge, "alpha"):
        layers.append(bridge.alpha[0])
    norms = {layer.eps for layer in layers if isinstance(layer, nn.LayerNorm)}
    return parameters_of(*layers) is not None and norms == {1e-5}


class TokenChain(nn.Module):
    """Runs it for one block, of whose weights it keeps a packed copy.

    Args:
        block: one that `is_chain`.

    Inputs:
        tokens (T, B, d) and gathered (B, T, C).

    Returns:
        `Made`.
    """

    packed: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        bridge, former, back = block.local_global, block.global_block, block.global_local
        (_, one), (_, other) = block._generators()
        gate = list(bridge.alpha[0].parameters()) if hasattr(bridge, "alpha") else [None, None]
        layers: Any = parameters_of(bridge.proj, bridge.layer_norm, *former._layers())
        layers += [None] * (14 + 2 - len(layers))  # no feed-forward network

        def both(*layers: nn.Linear) -> list[Tensor]:
            return [
                torch.cat([layer.weight for layer in layers]),
                torch.cat([layer.bias for layer in layers]),
            ]

        weights = [*gate, *layers, *both(one.hyper[0], other.hyper[0])]
        weights += [one.hyper[2].weight, other.hyper[2].weight, one.hyper[2].bias, other.hyper[2].bias]
        weights += both(back.k, back.proj)
        self.offsets: list[int] = []
        parts, size = [], 0
        for weight in weights:
            self.offsets.append(-1 if weight is None else size)
            if weight is not None:
                parts.append(nn.functional.pad(weight.detach().flatten(), (0, -weight.numel() % ALIGNED)))
                size += parts[-1].numel()
        self.register_buffer("packed", torch.cat(parts))
        hidden = former.ffn[0].out_features if hasattr(former, "ffn") else 0
        functions = [hyper.hyper[2].out_features for hyper in (one, other)]
        units = one.hyper[0].out_features
        channels = [bridge.channels, back.channels]
        self.sizes = [former.num_heads, hidden, *channels, units, *functions, block.token_id]

    def forward(self, tokens: Tensor, gathered: Tensor) -> Made:
        """On a CUDA device."""
        run: Any = torch.ops.mfkernels_cuda.token_chain
        *made, back = run(tokens, gathered, self.packed, self.offsets, self.sizes, 1e-5)
        return Made(*made, *back)

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .drop_path import DropPath
from .gate import gate_layer
from .inputs import check_mixing, check_tokens, needed, parameters_of, same_epsilon, untouched
from .replacement import Replacement


class Former(Replacement):
    """Self-attention among the tokens and a feed-forward network, each with a residual and a norm after.

    Keys and values are the tokens themselves: there is no W^K and no W^V.

    Args:
        token_dim: d, divisible by `num_heads`.
        num_heads: 4 in all released models.
        ffn: whether the feed-forward network (d -> 2d -> d, GELU) is there.
        gate: scale the attended tokens by 2 hardsigmoid(Linear(tokens)); off in released models.
        mixing: "attn"; ablations "mlp" (an MLP over the token axis) and "mlp_attn" (their sum).
        token_num, mlp_expansion: T and the expansion of that MLP; for "mlp" only.
        drop_path: rate of stochastic depth of the attention's residual; along the tokens, see `DropPath`.

    Inputs:
        tokens (T, B, d).

    Returns:
        tokens (T, B, d).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `GlobalBlock`.
    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2 and figure 3; projections from the released
    code.
    """

    def __init__(
        self,
        token_dim: int,
        *,
        num_heads: int = 4,
        ffn: bool = True,
        gate: bool = False,
        mixing: str = "attn",
        token_num: int | None = None,
        mlp_expansion: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_mixing("Former", mixing)
        if token_dim % num_heads:
            raise ValueError(f"Former: num_heads must divide token_dim = {token_dim}, got {num_heads}")
        self.token_dim, self.num_heads = token_dim, num_heads
        if ffn:
            self.ffn = nn.Sequential(
                nn.Linear(token_dim, 2 * token_dim), nn.GELU(), nn.Linear(2 * token_dim, token_dim)
            )
            self.ffn_norm = nn.LayerNorm(token_dim)
        if gate:
            self.alpha = gate_layer(token_dim, token_dim)
        if "mlp" in mixing:
            tokens = needed("Former", mixing, "token_num", token_num)
            hidden = tokens * mlp_expansion
            self.token_mlp = nn.Sequential(nn.Linear(tokens, hidden), nn.GELU(), nn.Linear(hidden, tokens))
        if "attn" in mixing:
            self.q = nn.Linear(token_dim, token_dim)
        self.channel_mlp = nn.Linear(token_dim, token_dim)
        self.layer_norm = nn.LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens("Former", tokens, self.token_dim)
        parameters = parameters_of(*self._layers())
        if parameters:
            run: Any = ops.former_block
            options: Any = dict(num_heads=self.num_heads, eps=self.layer_norm.eps)
            formed = run(tokens.transpose(0, 1), *parameters, **options)
            # Of tokens that do not lie in one run, each linear layer makes a copy, and adds its bias apart.
            return formed.transpose(0, 1).contiguous()
        mixed = None
        if hasattr(self, "token_mlp"):
            expected = self.token_mlp[0].in_features
            if tokens.shape[0] != expected:
                raise ValueError(
                    f"Former: built for T = {expected} tokens, got tokens of shape {tuple(tokens.shape)}"
                )
            mixed = self.token_mlp(tokens.permute(1, 2, 0)).permute(2, 0, 1)
        if hasattr(self, "q"):
            attended = self._attend(tokens)
            mixed = attended if mixed is None else mixed + attended
        if hasattr(self, "alpha"):
            mixed = mixed * (2 * self.alpha(tokens))
        tokens = self.layer_norm(tokens + self.drop_path(self.channel_mlp(mixed)))
        if hasattr(self, "ffn"):
            tokens = self.ffn_norm(tokens + self.ffn(tokens))
        return tokens

    def _layers(self) -> list[nn.Module]:
        """Return the operator's parameters in its order; none where a part is dropped or has to be called."""
        ablation = not hasattr(self, "q") or hasattr(self, "token_mlp") or hasattr(self, "alpha")
        if ablation or not untouched(self.drop_path, DropPath) or (self.training and self.drop_path.rate > 0):
            return []
        layers: list[nn.Module] = [self.q, self.channel_mlp, self.layer_norm]
        if not hasattr(self, "ffn"):
            return layers
        if not untouched(self.ffn, nn.Sequential) or not same_epsilon(self.layer_norm, self.ffn_norm):
            return []
        first, gelu, *last = self.ffn
        plain = untouched(gelu, nn.GELU) and gelu.approximate == "none"
        return [*layers, first, *last, self.ffn_norm] if plain else []

    def _attend(self, tokens: Tensor) -> Tensor:
        def by_head(z: Tensor) -> Tensor:  # (T, B, d) -> (B, h, T, c)
            return z.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)

        q, k = by_head(self.q(tokens)), by_head(tokens)
        scale = (self.token_dim // self.num_heads) ** -0.5
        out = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ k
        return out.permute(2, 0, 1, 3).flatten(2)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .drop_path import DropPath
from .gate import gate_layer
from .inputs import Pair, check_channels, check_mixing, check_positions, map_and_tokens, needed
from .padding import Padding
from .replacement import Replacement


class MobileToFormer(Replacement):
    """Mobile -> Former: the tokens attend to the pixels of a feature map.

    Args:
        channels: C, of the map; divisible by `num_heads`.
        token_dim: d.
        num_heads: heads of the attention; head j takes the j-th slice of C / num_heads channels.
        gate: scale what the tokens gathered by 2 hardsigmoid(Linear(tokens)). On in all released models.
        mixing: "attn"; ablations "mlp" (a linear layer over the pixels) and "mlp_attn" (their sum).
        token_num, positions: T, and the pixels of the map; needed for "mlp" only.
        local_projection: ablation with 1x1 convolutions for keys and values; released models use the map
            itself for both.
        drop_path: rate of stochastic depth; along the tokens, see `DropPath`.

    Inputs:
        x (B, C, H, W) and tokens (T, B, d), or one pair of them. `position`: None, or (T, B, d), added to
        the tokens for the queries alone. `padding`: None, or what of the map is padding, to which the tokens
        do not attend.

    Returns:
        tokens (T, B, d), and the logits (B, num_heads, T, H, W), scaled, before the softmax, zero in the
        padding. The logits are None for "mlp" and with `return_logits=False`, which saves their memory.

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Local2Global`.
    Source: Chen et al., Mobile-Former, CVPR 2022, equation 1; gate, biases and W^Q from the released code.
    """

    def __init__(
        self,
        channels: int,
        token_dim: int,
        *,
        num_heads: int = 2,
        gate: bool = True,
        mixing: str = "attn",
        token_num: int | None = None,
        positions: int | None = None,
        local_projection: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_mixing("MobileToFormer", mixing)
        self.channels, self.token_dim, self.num_heads = channels, token_dim, num_heads
        if gate:
            self.alpha = gate_layer(token_dim, channels)
        if "mlp" in mixing:
            self.mlp = nn.Linear(
                needed("MobileToFormer", mixing, "positions", positions),
                needed("MobileToFormer", mixing, "token_num", token_num),
            )
        if "attn" in mixing:
            self.q = nn.Linear(token_dim, channels)
        self.proj = nn.Linear(channels, token_dim)
        self.layer_norm = nn.LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)
        if local_projection:
            self.k = nn.Conv2d(channels, channels, 1, bias=False)
            self.v = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(
        self,
        x: Tensor | Pair,
        tokens: Tensor | None = None,
        return_logits: bool = True,
        position: Tensor | None = None,
        padding: Padding | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x, tokens = map_and_tokens("MobileToFormer", x, tokens, self.token_dim)
        check_channels("MobileToFormer", x, self.channels)
        gathered, logits = None, None
        if padding is not None and (hasattr(self, "mlp") or hasattr(self, "k")):
            raise ValueError("MobileToFormer: padding needs mixing 'attn' and no local_projection")
        if hasattr(self, "mlp"):
            check_positions("MobileToFormer", x.shape[2], x.shape[3], self.mlp.in_features)
            gathered = self.mlp(x.flatten(2)).permute(2, 0, 1)
        if hasattr(self, "q"):
            q = self.q(tokens if position is None else tokens + position).transpose(0, 1)
            attended, logits = self._attend(x, q, return_logits, padding)
            attended = attended.transpose(0, 1).contiguous()
            gathered = attended if gathered is None else gathered + attended
        if hasattr(self, "alpha"):
            gathered = gathered * (2 * self.alpha(tokens))
        tokens = self.layer_norm(tokens + self.drop_path(self.proj(gathered)))
        return tokens, logits if return_logits else None

    def _attend(
        self, x: Tensor, q: Tensor, return_logits: bool, padding: Padding | None
    ) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "k"):
            return self._attend_projected(x, q)
        mask = None if padding is None else ~padding.inside(x)[:, 0]
        out = ops.mobile_to_former_attention(x, q, self.num_heads, None, return_logits, mask)
        return out if isinstance(out, tuple) else (out, None)

    def _attend_projected(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = x.shape
        heads = (batch, self.num_heads, channels // self.num_heads, -1)
        q = q.transpose(1, 2).reshape(heads).transpose(2, 3)  # (B, h, T, c)
        k, v = self.k(x).reshape(heads), self.v(x).reshape(heads)
        logits = q @ k * heads[2] ** -0.5  # (B, h, T, N)
        out = F.softmax(logits, dim=-1) @ v.transpose(2, 3)
        return torch.cat(out.unbind(1), dim=-1), logits.unflatten(-1, (height, width))

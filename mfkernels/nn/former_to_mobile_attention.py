import torch
from torch import Tensor, nn

from .. import ops
from .drop_path import DropPath
from .gate import gate_layer
from .inputs import Pair, check_channels, check_mixing, check_positions, map_and_tokens, needed, untouched
from .replacement import Replacement


class FormerToMobile(Replacement):
    """Mobile <- Former: the pixels of a feature map attend to the tokens; the map is added.

    Args:
        channels: C, of the map; divisible by `num_heads`.
        token_dim: d.
        token_num: T. The released code reshapes with it, so other numbers of tokens are an error.
        num_heads: heads of the attention; head j takes the j-th slice of C / num_heads channels.
        gate: scale the values by 2 hardsigmoid(Linear(tokens)); off in released models.
        mixing: "attn"; ablations "mlp" (a linear layer from tokens to pixels) and "mlp_attn" (their sum).
        positions: the pixels of the map; needed for "mlp" only.
        local_projection: ablation with 1x1 convolutions for queries and outputs.
        drop_path: rate of stochastic depth, per sample.

    Inputs:
        x (B, C, H, W) and tokens (T, B, d), or one pair of them.

    Returns:
        (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Global2Local`. The gradient of `k.bias` is zero in theory: the softmax over the
    tokens does not change with it.
    Source: Chen et al., Mobile-Former, CVPR 2022, equation 2.
    """

    def __init__(
        self,
        channels: int,
        token_dim: int,
        *,
        token_num: int,
        num_heads: int = 2,
        gate: bool = False,
        mixing: str = "attn",
        positions: int | None = None,
        local_projection: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_mixing("FormerToMobile", mixing)
        self.channels, self.token_dim, self.token_num = channels, token_dim, token_num
        self.num_heads = num_heads
        if gate:
            self.alpha = gate_layer(token_dim, channels)
        if "mlp" in mixing:
            self.mlp = nn.Linear(token_num, needed("FormerToMobile", mixing, "positions", positions))
        if "attn" in mixing:
            self.k = nn.Linear(token_dim, channels)
        self.proj = nn.Linear(token_dim, channels)
        self.drop_path = DropPath(drop_path)
        if local_projection:
            self.q = nn.Conv2d(channels, channels, 1, bias=False)
            self.fuse = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor | Pair, tokens: Tensor | None = None) -> Tensor:
        x, tokens = map_and_tokens("FormerToMobile", x, tokens, self.token_dim)
        check_channels("FormerToMobile", x, self.channels)
        if tokens.shape[0] != self.token_num:
            raise ValueError(
                f"FormerToMobile: tokens must have shape (T, B, d) with T = {self.token_num}, "
                f"got {tuple(tokens.shape)}"
            )
        v = self.proj(tokens)
        if hasattr(self, "alpha"):
            v = v * (2 * self.alpha(tokens))
        v = v.transpose(0, 1)  # (B, T, C)
        ablation = hasattr(self, "mlp") or hasattr(self, "q")
        if ablation or not untouched(self.drop_path, DropPath):
            return x + self.drop_path(self._taken(x, tokens, v))
        scale = self.drop_path.scale(x)  # (B, 1, 1, 1)
        if scale is not None:  # the attention is linear in its values
            v = v * scale.flatten(1)[..., None]
        return ops.former_to_mobile_attention(x, self.k(tokens).transpose(0, 1), v, self.num_heads)

    def _taken(self, x: Tensor, tokens: Tensor, v: Tensor) -> Tensor:
        """Return what the map takes from the tokens, which is added to it."""
        parts = []
        if hasattr(self, "k"):
            q = self.q(x) if hasattr(self, "q") else x
            y = self._attend(q, self.k(tokens).transpose(0, 1), v).reshape(x.shape)
            parts.append(self.fuse(y) if hasattr(self, "fuse") else y)
        if hasattr(self, "mlp"):
            check_positions("FormerToMobile", x.shape[2], x.shape[3], self.mlp.out_features)
            parts.append(self.mlp(v.transpose(1, 2)).reshape(x.shape))
        return sum(parts[1:], parts[0])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def by_head(z: Tensor) -> Tensor:  # (B, C, n) -> (B, h, c, n)
            return z.unflatten(1, (self.num_heads, -1))

        q, k, v = by_head(q.flatten(2)), by_head(k.transpose(1, 2)), by_head(v.transpose(1, 2))
        logits = k.transpose(2, 3) @ q * q.shape[2] ** -0.5  # (B, h, T, N)
        return (v @ torch.softmax(logits, dim=2)).flatten(1, 2)

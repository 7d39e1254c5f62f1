from torch import Tensor, nn

from ..checks import check_heads


class EncoderLayer(nn.Module):
    """Run multi-head self-attention and a feed-forward network (d -> 2d -> d, GELU).

    Each has a residual, and a norm after it.

    Args:
        dim: d, divisible by `num_heads`.
        num_heads: of the attention, which has four projections.
        dropout: rate, of the attention and of both residuals.

    Inputs:
        x (N, B, d). `position`: None, or (N, B, d) or (N, 1, d), added for queries and keys, not for values.
        `outside`: None, or (B, N), bool, True for those that nobody attends to.

    Returns:
        (N, B, d).

    Raises:
        TypeError, ValueError: `num_heads` does not fit, named.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 4: the Former of the detector's head and, over the
    pixels of a map, its attention in Mobile; the layout is that of Carion et al., DETR, ECCV 2020.
    """

    def __init__(self, dim: int, *, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        check_heads("EncoderLayer", num_heads, dim, "dim")
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout)
        self.layer_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor | None = None, outside: Tensor | None = None) -> Tensor:
        query = x if position is None else x + position
        attended, _ = self.attention(query, query, x, key_padding_mask=outside, need_weights=False)
        x = self.layer_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

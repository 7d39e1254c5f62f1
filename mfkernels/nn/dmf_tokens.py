"""Update the tokens of Dynamic Mobile-Former, (B, T, d), under the names of its released code."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..checks import check_shape, check_tensor
from .drop_path import DropPath
from .inputs import check_channels, parameters_of, same_epsilon, untouched
from .replacement import Replacement


class DMFMobileToFormer(Replacement):
    """Let DMF's tokens, normalised, attend to the pixels (Mobile -> Former).

    The residual adds the normalised tokens, too.

    Args:
        channels: C, of the map; divisible by `num_heads`.
        token_dim: d.
        num_heads: heads of the attention; head j takes the j-th slice of C / num_heads channels.
        dropout: of what is added.
        drop_path: rate of stochastic depth.

    Inputs:
        x (B, C, H, W) and tokens (B, T, d).

    Returns:
        tokens (B, T, d).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Mobile2Former`.
    Source: Yun and Ro, Dynamic Mobile-Former, section 3.2; the residual from the released code.
    """

    def __init__(
        self,
        channels: int,
        token_dim: int,
        *,
        num_heads: int = 2,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels, self.token_dim, self.num_heads = channels, token_dim, num_heads
        self.norm = nn.LayerNorm(token_dim)
        self.q = nn.Linear(token_dim, channels, bias=False)
        self.fc = nn.Linear(channels, token_dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        _check("DMFMobileToFormer", x, tokens, self.channels, self.token_dim)
        tokens = self.norm(tokens)
        gathered = ops.mobile_to_former_attention(x, self.q(tokens), self.num_heads)
        return self.drop_path(self.dropout(self.fc(gathered))) + tokens


class DMFFormerToMobile(nn.Module):
    """Mobile <- Former of DMF: a part of the released file that no released network uses.

    Args:
        channels: C, of the map; divisible by `num_heads`.
        token_dim: d.
        num_heads: heads of the attention.

    Inputs:
        x (B, C, H, W) and tokens (B, T, d).

    Returns:
        x (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Former2Mobile`.
    """

    def __init__(self, channels: int, token_dim: int, *, num_heads: int = 2) -> None:
        super().__init__()
        self.channels, self.token_dim, self.num_heads = channels, token_dim, num_heads
        self.norm = nn.LayerNorm(token_dim)
        self.kv = nn.Linear(token_dim, 2 * channels, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        _check("DMFFormerToMobile", x, tokens, self.channels, self.token_dim)
        k, v = self.kv(self.norm(tokens)).chunk(2, dim=-1)
        return ops.former_to_mobile_attention(x, k, v, self.num_heads)


class _TokenAttention(nn.Module):
    def __init__(self, token_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(token_dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class _MLP(nn.Module):
    def __init__(self, token_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(token_dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, token_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens)))))


class DMFFormer(Replacement):
    """The Former of DMF: a standard transformer block with norms before.

    Args:
        token_dim: d; heads have 32 channels, so a multiple of 32.
        dropout: of the attention's and the network's results.
        drop_path: rate of stochastic depth of both residuals.

    Inputs:
        tokens (B, T, d).

    Returns:
        tokens (B, T, d).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Former`.
    Source: Yun and Ro, Dynamic Mobile-Former, section 3.2.
    """

    def __init__(self, token_dim: int, *, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        if token_dim < 32 or token_dim % (token_dim // 32):
            raise ValueError(f"DMFFormer: token_dim must divide into heads of 32 channels, got {token_dim}")
        self.token_dim = token_dim
        self.token_attention = _TokenAttention(token_dim, token_dim // 32, dropout)
        self.norm1 = nn.LayerNorm(token_dim)
        self.mlp = _MLP(token_dim, 2 * token_dim, dropout)
        self.norm2 = nn.LayerNorm(token_dim)
        self.dropout, self.drop_path = dropout, DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tensor("DMFFormer", "tokens", tokens, "B T d")
        check_shape("DMFFormer", "tokens", tokens, "B T d", (*tokens.shape[:2], self.token_dim))
        parameters = parameters_of(*self._layers())
        if parameters:
            run: Any = ops.former_block
            heads = self.token_attention.num_heads
            return run(tokens, *parameters, num_heads=heads, form="standard", eps=self.norm1.eps)
        tokens = tokens + self.drop_path(self.token_attention(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def _layers(self) -> list[nn.Module]:
        """Return the operator's parameters in its order; none where a part is dropped or has to be called."""
        if self.training and (self.dropout > 0 or self.drop_path.rate > 0):
            return []
        attention, mlp = self.token_attention, self.mlp
        plain = (
            untouched(attention, _TokenAttention)
            and untouched(attention.dropout, nn.Dropout)
            and untouched(mlp, _MLP)
            and untouched(mlp.dropout, nn.Dropout)
            and untouched(self.drop_path, DropPath)
            and same_epsilon(self.norm1, self.norm2)
        )
        if not plain:
            return []
        return [attention.qkv, attention.proj, self.norm1, mlp.fc1, mlp.fc2, self.norm2]


def _check(module: str, x: Tensor, tokens: Tensor, channels: int, token_dim: int) -> None:
    check_tensor(module, "x", x, "B C H W")
    check_channels(module, x, channels)
    check_tensor(module, "tokens", tokens, "B T d")
    check_shape(module, "tokens", tokens, "B T d", (x.shape[0], tokens.shape[1], token_dim))

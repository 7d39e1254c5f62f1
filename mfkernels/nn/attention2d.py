from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_heads, check_tensor
from .conv_bn import ConvBN
from .inputs import check_channels
from .layer_norm2d import LayerNorm2d


class Attention2d(nn.Module):
    """Attend among all pixels, without a gate.

    These are the baselines that iFormer's SHMA is compared with: multi-head attention and, with one head,
    single-head attention.

    Args:
        channels: C, divisible by `num_heads`.
        num_heads: head j takes the j-th slice of C / num_heads channels.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: `q`, `k`, `v_gate` (the values alone), `proj`, as of `SingleHeadModulationAttention`.
    Source: Zheng, iFormer, ICLR 2025, section 3.3 (SHA, MHA).
    """

    def __init__(self, channels: int, *, num_heads: int = 1) -> None:
        super().__init__()
        check_heads("Attention2d", num_heads, channels, "the channels")
        self.channels, self.num_heads = channels, num_heads
        self.q = ConvBN(channels, channels)
        self.k = ConvBN(channels, channels)
        self.proj = ConvBN(channels, channels)
        self.v_gate = ConvBN(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("Attention2d", "x", x, "B C H W")
        check_channels("Attention2d", x, self.channels)
        return self.proj(attend(self.q(x), self.k(x), self.v_gate(x), self.num_heads))


class PreNormModulationAttention(nn.Module):
    """Attend as SHMA does, with SiLU instead of sigmoid and a layer norm before instead of batch norms.

    The result is `proj(silu(gate) * silu(attention(q, k, v)))`.

    Args:
        channels: C.
        reduction: R; queries and keys have C // R channels.
        form: "paper": SiLU of the attention's result; "released": of the values before it.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Zheng, iFormer, ICLR 2025, table 6; not in the released code.
    """

    def __init__(self, channels: int, *, reduction: int = 2, form: str = "paper") -> None:
        super().__init__()
        if form not in ("released", "paper"):
            raise ValueError(f"PreNormModulationAttention: form must be 'released' or 'paper', got {form!r}")
        self.channels, self.form = channels, form
        self.norm = LayerNorm2d(channels)
        self.q = nn.Conv2d(channels, channels // reduction, 1)
        self.k = nn.Conv2d(channels, channels // reduction, 1)
        self.v_gate = nn.Conv2d(channels, 2 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("PreNormModulationAttention", "x", x, "B C H W")
        check_channels("PreNormModulationAttention", x, self.channels)
        x = self.norm(x)
        v, gate = self.v_gate(x).chunk(2, dim=1)
        if self.form == "released":
            context = attend(self.q(x), self.k(x), F.silu(v))
        else:
            context = F.silu(attend(self.q(x), self.k(x), v))
        return self.proj(F.silu(gate) * context)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int = 1) -> Tensor:
    """Attention among the pixels of maps (B, D, H, W), (B, D, H, W) and (B, C, H, W)."""

    def by_head(x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3)  # (B, heads, pixels, channels)

    out = F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v))
    return out.transpose(2, 3).reshape(v.shape)

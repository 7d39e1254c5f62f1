import torch
from torch import Tensor
from torch.nn import functional as F


def former_block_reference(
    tokens: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    num_heads: int = 4,
    form: str = "released",
    eps: float = 1e-5,
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.former_block`; same arguments."""

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm2_weight, norm2_bias, eps)

    def feed_forward(x: Tensor) -> Tensor:
        assert fc1_weight is not None and fc2_weight is not None
        return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

    def project(x: Tensor) -> Tensor:
        return F.linear(x, proj_weight, proj_bias)

    if form == "standard":
        q, k, v = F.linear(norm1(tokens), qkv_weight, qkv_bias).chunk(3, dim=-1)
        tokens = tokens + project(attention(q, k, v, num_heads))
        return tokens + feed_forward(norm2(tokens))
    q = F.linear(tokens, qkv_weight, qkv_bias)
    tokens = norm1(tokens + project(attention(q, tokens, tokens, num_heads)))
    return tokens if fc1_weight is None else norm2(tokens + feed_forward(tokens))


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """(B, T, d) each; head j takes the j-th slice of d / num_heads channels."""
    batch, tokens, width = q.shape

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2)

    logits = by_head(q) @ by_head(k).transpose(2, 3) * (width // num_heads) ** -0.5
    out = torch.softmax(logits, dim=-1) @ by_head(v)
    return out.transpose(1, 2).reshape(batch, tokens, width)

import torch
from torch import Tensor


def former_to_mobile_attention_reference(
    x: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.former_to_mobile_attention`; same arguments."""
    batch, channels, height, width = x.shape
    tokens = k.shape[1]
    head_dim = channels // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    queries = x.reshape(batch, num_heads, head_dim, height * width).transpose(-1, -2)
    keys = k.reshape(batch, tokens, num_heads, head_dim).permute(0, 2, 3, 1)
    values = v.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)
    attention = torch.softmax(scale * (queries @ keys), dim=-1)  # (B, heads, H*W, M): over the tokens
    out = attention @ values  # (B, heads, H*W, head_dim)
    return x + out.transpose(-1, -2).reshape(batch, channels, height, width)

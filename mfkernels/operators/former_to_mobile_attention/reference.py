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
    queries = x.reshape(batch, num_heads, head_dim, height * width)
    keys = k.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)
    values = v.reshape(batch, tokens, num_heads, head_dim).permute(0, 2, 3, 1)
    attention = torch.softmax(scale * (keys @ queries), dim=2)  # (B, heads, M, H*W): over the tokens
    out = values @ attention  # (B, heads, head_dim, H*W)
    return x + out.reshape(batch, channels, height, width)

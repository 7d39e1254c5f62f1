import torch
from torch import Tensor


def mobile_to_former_attention_reference(
    x: Tensor, q: Tensor, num_heads: int, scale: float | None = None, return_logits: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain-PyTorch definition of `mfkernels.ops.mobile_to_former_attention`; same arguments."""
    batch, channels, height, width = x.shape
    tokens = q.shape[1]
    head_dim = channels // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    pixels = x.reshape(batch, num_heads, head_dim, height * width)
    queries = q.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)
    logits = scale * (queries @ pixels)  # (B, heads, M, H*W)
    out = torch.softmax(logits, dim=-1) @ pixels.transpose(-1, -2)  # keys and values are the pixels
    out = out.transpose(1, 2).reshape(batch, tokens, channels)
    if return_logits:
        return out, logits.reshape(batch, num_heads, tokens, height, width)
    return out

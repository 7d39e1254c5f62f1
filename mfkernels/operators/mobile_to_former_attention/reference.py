import torch
from torch import Tensor


def mobile_to_former_attention_reference(
    x: Tensor,
    q: Tensor,
    num_heads: int,
    scale: float | None = None,
    return_logits: bool = False,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain-PyTorch definition of `mfkernels.ops.mobile_to_former_attention`; same arguments."""
    batch, channels, height, width = x.shape
    tokens = q.shape[1]
    head_dim = channels // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    pixels = x.reshape(batch, num_heads, head_dim, height * width)
    queries = q.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)
    if mask is None:
        logits = scale * (queries @ pixels)  # (B, heads, M, H*W)
        weights = torch.softmax(logits, dim=-1)
    else:
        outside = mask.reshape(batch, 1, 1, height * width)
        pixels = pixels.masked_fill(outside, 0.0)
        logits = (scale * (queries @ pixels)).masked_fill(outside, 0.0)
        weights = torch.softmax(hide_logits(logits, outside), dim=-1).masked_fill(outside, 0.0)
    out = weights @ pixels.transpose(-1, -2)  # keys and values are the pixels
    out = out.transpose(1, 2).reshape(batch, tokens, channels)
    if return_logits:
        return out, logits.reshape(batch, num_heads, tokens, height, width)
    return out


def hide_logits(logits: Tensor, outside: Tensor) -> Tensor:
    """Return the logits with -inf for the pixels `outside`, so that they weigh nothing in a softmax.

    A sample that has no other pixels keeps its own: its softmax would be NaN, though nobody reads it.
    """
    return logits.masked_fill(outside & ~outside.all(-1, keepdim=True), -torch.inf)

import torch
from torch import Tensor


def modulation_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    scale: float | None = None,
    form: str = "released",
    window_size: int | None = None,
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.modulation_attention`; same arguments."""
    batch, depth, height, width = q.shape
    scale = depth**-0.5 if scale is None else scale
    if window_size is not None:
        q, k, v, gate = (to_windows(x, window_size) for x in (q, k, v, gate))
        out = modulation_attention_reference(q, k, v, gate, scale, form)
        return from_windows(out, batch, height, width)
    q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)  # (B, D or C, N)
    if form == "released":
        v = torch.sigmoid(v)
    attention = torch.softmax(scale * (q.transpose(1, 2) @ k), dim=2)  # (B, queries, keys)
    context = v @ attention.transpose(1, 2)
    if form == "paper":
        context = torch.sigmoid(context)
    return context.reshape(gate.shape) * torch.sigmoid(gate)


def to_windows(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B * windows, C, size, size)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // size, size, width // size, size)
    x = x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch * (height // size) * (width // size), channels, size, size)


def from_windows(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Return the inverse of `to_windows`."""
    channels, size = x.shape[1], x.shape[2]
    x = x.reshape(batch, height // size, width // size, channels, size, size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)

import torch
from torch import Tensor
from torch.nn import functional as F


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-PyTorch definition of `mfkernels.ops.batch_norm`; same arguments."""
    wide = x if x.dtype == torch.float64 else x.float()
    if mean is None or variance is None:
        mean = wide.mean((0, 2, 3))
        variance = (wide - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    shape = (1, -1, 1, 1)
    normal = (wide - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
    y = normal * weight.view(shape) + bias.view(shape)
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype), mean, variance

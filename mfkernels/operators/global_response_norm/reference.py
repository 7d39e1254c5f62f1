import torch
from torch import Tensor


def global_response_norm_reference(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: str = "channels", eps: float = 1e-6
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.global_response_norm`; same arguments."""
    norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)  # (B, C, 1, 1); gradient 0 at norm 0
    means = norms.mean(dim=1, keepdim=True) if mean == "channels" else norms
    response = norms / (means + eps)
    return gamma.view(1, -1, 1, 1) * (x * response) + beta.view(1, -1, 1, 1) + x

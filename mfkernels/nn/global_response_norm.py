import torch
from torch import Tensor, nn

from .. import ops
from .replacement import Replacement


class GlobalResponseNorm(Replacement):
    """`gamma * x * n + beta + x`, with n from the norms of the channels: see `ops.global_response_norm`.

    Args:
        channels: C.
        mean: "released", as the released DMF networks were trained, or "channels", as published.
        eps: added to the mean.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `GRN`: gamma and beta, (1, C, 1, 1), zeros at the beginning.
    Source: Woo et al., ConvNeXt V2, CVPR 2023; Yun and Ro, Dynamic Mobile-Former, equation 5.
    """

    def __init__(self, channels: int, *, mean: str = "released", eps: float = 1e-6) -> None:
        super().__init__()
        if mean not in ("channels", "released"):
            raise ValueError(f"GlobalResponseNorm: mean must be 'channels' or 'released', got {mean!r}")
        self.mean, self.eps = mean, eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return ops.global_response_norm(x, self.gamma.flatten(), self.beta.flatten(), self.mean, self.eps)

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[1]}, mean={self.mean!r}, eps={self.eps}"

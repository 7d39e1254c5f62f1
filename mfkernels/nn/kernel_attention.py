import torch
from torch import Tensor, nn

from ..checks import check_shape, check_tensor
from .inputs import check_channels


class KernelAttention(nn.Module):
    """The weights of a dynamic convolution's kernels, from a token and the map that it convolves.

    `s(W2 relu(BN(W1 [token, mean of x])) / temperature)`, s being a sigmoid or a softmax over the kernels.

    Args:
        channels: C, of the map.
        token_dim: d.
        num_kernels: K.
        temperature: divides the scores. A plain attribute, read at every call and no part of the state.
        activation: "sigmoid", as released, or "softmax".

    Inputs:
        x (B, C, H, W) and token (B, d); x's mean (B, C, 1, 1), where it has been made.

    Returns:
        (B, K).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named. In train mode also from batch
            norm, for a batch of one.

    State: the released `Kernel_Attention`.
    Source: Yun and Ro, Dynamic Mobile-Former, equation 4 and figure 3; the softmax is its ablation.
    """

    def __init__(
        self,
        channels: int,
        token_dim: int,
        num_kernels: int,
        *,
        temperature: float = 1.0,
        activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(
                f"KernelAttention: activation must be 'sigmoid' or 'softmax', got {activation!r}"
            )
        self.channels, self.token_dim = channels, token_dim
        self.temperature, self.activation = temperature, activation
        self.net1 = nn.Conv2d(channels + token_dim, token_dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(token_dim)
        self.relu = nn.ReLU()
        self.net2 = nn.Conv2d(token_dim, num_kernels, 1, bias=False)

    def forward(self, x: Tensor, token: Tensor, mean: Tensor | None = None) -> Tensor:
        check_tensor("KernelAttention", "x", x, "B C H W")
        check_channels("KernelAttention", x, self.channels)
        check_tensor("KernelAttention", "token", token, "B d")
        check_shape("KernelAttention", "token", token, "B d", (x.shape[0], self.token_dim))
        mean = x.mean((2, 3), keepdim=True) if mean is None else mean
        both = torch.cat([token[..., None, None], mean], 1)
        scores = self.net2(self.relu(self.bn(self.net1(both)))).flatten(1)
        if self.temperature != 1:
            scores = scores / self.temperature
        return torch.sigmoid(scores) if self.activation == "sigmoid" else torch.softmax(scores, 1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, activation={self.activation!r}"

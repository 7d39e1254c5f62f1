import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_shape, check_tensor
from .inputs import check_channels
from .pointwise_conv_bn import conv_norm
from .replacement import Replacement


class DMFStem(Replacement):
    """The first layers of DMF: a convolution with stride 2 and bias, batch norm, GELU.

    Args:
        in_channels, out_channels, kernel_size: of the convolution.

    Inputs:
        x (B, in_channels, H, W).

    Returns:
        (B, out_channels, ceil(H / 2), ceil(W / 2)).

    Raises:
        TypeError, ValueError: an input that does not fit, named.

    State: the released `Stem`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, 2, kernel_size // 2)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("DMFStem", "x", x, "B C H W")
        check_channels("DMFStem", x, self.conv.in_channels)
        return conv_norm(self.conv, self.bn, x, "gelu")


class DMFHead(nn.Module):
    """The last layers of DMF: mean over the pixels, the first token beside it; linear, hardswish, linear.

    Args:
        channels: C, of the map.
        token_dim: d.
        hidden: outputs of the first linear layer.
        num_classes: outputs of the second layer.
        dropout: before the second.

    Inputs:
        x (B, C, H, W) and tokens (B, T, d).

    Returns:
        (B, num_classes).

    Raises:
        TypeError, ValueError: an input that does not fit, named.

    State: the released `Head`.
    """

    def __init__(
        self, channels: int, token_dim: int, hidden: int, num_classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.channels, self.token_dim = channels, token_dim
        self.fc1 = nn.Linear(channels + token_dim, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        check_tensor("DMFHead", "x", x, "B C H W")
        check_channels("DMFHead", x, self.channels)
        check_tensor("DMFHead", "tokens", tokens, "B T d")
        check_shape("DMFHead", "tokens", tokens, "B T d", (x.shape[0], tokens.shape[1], self.token_dim))
        both = torch.cat([x.mean((2, 3)), tokens[:, 0]], dim=1)
        return self.fc2(self.dropout(F.hardswish(self.fc1(both))))

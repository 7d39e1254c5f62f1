from torch import Tensor, nn

from ..checks import check_tensor
from .inputs import check_channels
from .pointwise_conv_bn import conv_norm
from .replacement import Replacement


class InvertedBottleneck(Replacement):
    """Pointwise, depthwise and pointwise convolution, each with a batch norm, GELU between; no residual.

    The first block of DMF.

    Args:
        in_channels, hidden_channels, out_channels: of the convolutions.
        stride, kernel_size: of the depthwise convolution.
        groups: of the pointwise ones.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, O, H', W').

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `BottleNeck`.
    Source: Yun and Ro, Dynamic Mobile-Former, table 1, where it is called bneck-lite.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        kernel_size: int = 3,
        groups: int = 1,
    ) -> None:
        super().__init__()
        hidden, padding = hidden_channels, kernel_size // 2
        self.in_channels = in_channels
        self.pw_conv1 = nn.Conv2d(in_channels, hidden, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.dw_conv = nn.Conv2d(hidden, hidden, kernel_size, stride, padding, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.pw_conv2 = nn.Conv2d(hidden, out_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("InvertedBottleneck", "x", x, "B C H W")
        check_channels("InvertedBottleneck", x, self.in_channels)
        x = conv_norm(self.pw_conv1, self.bn1, x, "gelu")
        x = conv_norm(self.dw_conv, self.bn2, x, "gelu")
        return conv_norm(self.pw_conv2, self.bn3, x)

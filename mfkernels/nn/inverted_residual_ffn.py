from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_tensor
from .global_response_norm import GlobalResponseNorm
from .inputs import check_channels
from .pointwise_conv_bn import conv_norm
from .replacement import Replacement


class InvertedResidualFFN(Replacement):
    """Run the feed-forward part of a DMF block.

    Its layers are pointwise, batch norm, GELU, depthwise 3x3 with a shortcut, global response norm, GELU,
    pointwise and batch norm. The block adds its input.

    Args:
        channels: C.
        hidden: E, between the two pointwise convolutions; what is not whole is cut off.
        mean: of the `GlobalResponseNorm`.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `ffn`.
    Source: Yun and Ro, Dynamic Mobile-Former, section 3.3 and figure 4.
    """

    def __init__(self, channels: int, hidden: float, *, mean: str = "released") -> None:
        super().__init__()
        self.channels, width = channels, int(hidden)
        self.pw_conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.dw_conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.grn = GlobalResponseNorm(width, mean=mean)
        self.pw_conv2 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("InvertedResidualFFN", "x", x, "B C H W")
        check_channels("InvertedResidualFFN", x, self.channels)
        x = conv_norm(self.pw_conv1, self.bn1, x, "gelu")
        x = F.gelu(self.grn(self.dw_conv(x) + x))
        return conv_norm(self.pw_conv2, self.bn3, x)

from torch import Tensor, nn

from .conv_bn import ConvBN
from .fused_sequential import run_layers
from .replacement import Replacement


class FusedInvertedBottleneck(Replacement):
    """A dense convolution that widens, GELU, and a pointwise one that narrows; no residual.

    Args:
        in_channels, out_channels: C and O.
        kernel_size, stride: of the first convolution, which has the padding `kernel_size // 2`.
        expansion: hidden channels over C.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, O, H', W').

    State: the released iFormer's `EdgeResidual`: `conv_exp_bn1`, `conv_pwl_bn2`.
    Source: Zheng, iFormer, ICLR 2025, section 3.2 (stem).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.conv_exp_bn1 = ConvBN(in_channels, hidden, kernel_size, stride, kernel_size // 2)
        self.act = nn.GELU()
        self.conv_pwl_bn2 = ConvBN(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return run_layers(x, self.conv_exp_bn1, self.act, self.conv_pwl_bn2)

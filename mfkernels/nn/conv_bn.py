from torch import Tensor, nn


class ConvBN(nn.Module):
    """A convolution without bias and its batch norm, under the names of the released iFormer: `c` and `bn`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as of `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

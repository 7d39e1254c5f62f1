import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch_norm import normalize
from .conv_bn import ConvBN, affine, conv_like


class ReparameterizedDepthwise(nn.Module):
    """Convolve depthwise, trained as a sum of branches.

    The branches are 7x7 and 3x3 with batch norms, 1x1 with bias, and the input; a batch norm follows. `fuse`
    turns all of them into one 7x7 convolution.

    Args:
        channels: C.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    State: the released iFormer's `RepVGGDW`: `conv`, `conv1`, `conv2`, `bn`.
    Source: Zheng, iFormer, ICLR 2025, released code; Ding et al., RepVGG, CVPR 2021.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvBN(channels, channels, 7, padding=3, groups=channels)
        self.conv1 = ConvBN(channels, channels, 3, padding=1, groups=channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.bn, self.conv(x) + self.conv1(x) + self.conv2(x) + x)

    def fuse(self) -> nn.Conv2d:
        """One 7x7 convolution with bias that does the work of all in eval mode."""
        large, small, one = self.conv.fuse(), self.conv1.fuse(), self.conv2
        assert large.bias is not None and small.bias is not None and one.bias is not None
        scale, shift = affine(self.bn)
        with torch.no_grad():
            centre = F.pad(one.weight + 1, (3, 3, 3, 3))  # the input itself, too
            weight = large.weight + F.pad(small.weight, (2, 2, 2, 2)) + centre
            bias = large.bias + small.bias + one.bias
            return conv_like(large, weight * scale.view(-1, 1, 1, 1), shift + scale * bias)

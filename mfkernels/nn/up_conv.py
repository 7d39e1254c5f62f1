from torch import Tensor, nn
from torch.nn import functional as F

from .depthwise import depthwise_layers, pointwise_layers
from .padding import Padding, hide, normalize_inside


class UpConv(nn.Module):
    """Bring a map to twice its size.

    It is up-sampled bilinearly, and a finer map of the backbone is added; a depthwise 3x3 and a 1x1
    convolution follow, each with a batch norm.

    The paper does not say how the channels come to agree (here: a 1x1 convolution with bias of the finer
    map), how corners are aligned (not), and of norms and activations (two batch norms, none).

    Args:
        finer_channels: of the finer map.
        channels: C, of the map.

    Inputs:
        x (B, C, H, W) and finer (B, finer_channels, H', W'), H' = 2H or 2H - 1 and W' so too. `padding`:
        None, or what of both is padding.

    Returns:
        (B, C, H', W').

    Source: Chen et al., Mobile-Former, CVPR 2022, section 4 and its table of the detector's head ("up-conv").
    """

    def __init__(self, finer_channels: int, channels: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(finer_channels, channels, 1)
        self.conv1 = nn.Sequential(*depthwise_layers(channels, channels, 3, 1, "dw"))
        self.conv2 = nn.Sequential(*pointwise_layers(channels, channels, 1))

    def forward(self, x: Tensor, finer: Tensor, padding: Padding | None = None) -> Tensor:
        up = _twice(x)
        if padding is not None:  # at the border the zeros of the padding are in the mean
            up = up / _twice(padding.inside(x).to(x.dtype)).clamp(min=0.5)
        x = hide(up[:, :, : finer.shape[2], : finer.shape[3]] + self.lateral(finer), padding)
        for conv, norm in (self.conv1, self.conv2):
            x = normalize_inside(norm, conv(x), padding)
        return hide(x, padding)


def _twice(x: Tensor) -> Tensor:
    """Double the size; with another map's size the mean's weights would depend on the batch's padding."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

"""Semantic segmentation over the pyramids of the networks; needs torchvision."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fpn import CHANNELS, PyramidWithFPN, pyramid_of
from .models import FeaturePyramid

__all__ = ["SemanticFPN", "semantic_fpn"]


class SemanticFPN(nn.Module):
    """Label every pixel from all levels of a feature pyramid network.

    A level is brought to the size of the finest by 3x3 convolutions with batch norm and ReLU, each followed
    by bilinear up-sampling by two; the sum of all levels is classified. The parts have the names of
    mmsegmentation's `FPNHead`.

    Args:
        backbone: returns the maps, the finest first, each half the size of the one before.
        num_classes: of pixels.
        channels: of the convolutions.
        dropout: the rate at which whole channels of the sum are dropped in training.

    Inputs:
        (B, 3, H, W), float32.

    Returns:
        A dictionary, as torchvision's networks for segmentation return it: "out" is (B, num_classes, H, W),
        scores before softmax.

    Source: Kirillov et al., Panoptic Feature Pyramid Networks, section 3.1, with batch norm in the place of
    group norm.
    """

    def __init__(
        self, backbone: FeaturePyramid, num_classes: int, channels: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.backbone = PyramidWithFPN(backbone)
        reductions = backbone.feature_info.reduction()
        self.scale_heads = nn.ModuleList(
            _to_finest((reduction // reductions[0]).bit_length() - 1, channels) for reduction in reductions
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        finest, *coarser = self.backbone(x).values()
        total = self.scale_heads[0](finest)
        for head, level in zip(self.scale_heads[1:], coarser, strict=True):
            # Sizes differ where halves were rounded up.
            total = total + _resized(head(level), total.shape[2:])
        scores = self.conv_seg(self.dropout(total))
        return {"out": _resized(scores, x.shape[2:])}


def semantic_fpn(backbone: str | FeaturePyramid, *, num_classes: int = 150) -> SemanticFPN:
    """Create Semantic FPN with 128 channels over the four maps of a network, with random weights.

    Args:
        backbone: a name of `list_models()`, or a pyramid of four maps: `create_model(name,
            features_only=True, checkpoint=path)` for one with released weights. By name the attentions of
            iformer_m, iformer_l and iformer_l2 are in windows of 16.
        num_classes: of pixels; those of ADE20K by default.

    Returns:
        The network, in train mode.

    Raises:
        TypeError: `backbone` is neither a name nor a pyramid.
        ValueError: an unknown name, a pyramid of another number of maps, or no classes.

    Source: iFormer, the table of Semantic FPN on ADE20K.
    """
    return SemanticFPN(pyramid_of("semantic_fpn", backbone, 4, num_classes), num_classes)


def _to_finest(halvings: int, channels: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i in range(max(1, halvings)):
        parts.append(_ConvBnReLU(channels if i else CHANNELS, channels))
        if halvings:
            parts.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*parts)


class _ConvBnReLU(nn.Module):
    """Convolve 3x3, normalise, and apply ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)

"""The feature pyramid network over the pyramids of the networks; needs torchvision."""

from typing import Any, cast

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from .models import FeaturePyramid, create_model, iformer

CHANNELS = 256  # of all levels


class PyramidWithFPN(nn.Module):
    """Run a pyramid and torchvision's feature pyramid network over its maps.

    Its parts have the names of torchvision's `BackboneWithFPN`. For inference `body` may be replaced by
    `mfkernels.deploy(body)`.

    Args:
        body: returns the maps.
        extra: makes levels that are coarser than the maps.

    Attributes:
        out_channels: of all levels, 256.

    Inputs:
        (B, 3, H, W), float32.

    Returns:
        A dictionary from the level's name, "0" for the finest map, to (B, 256, H / reduction, W / reduction).

    Source: Lin et al., Feature Pyramid Networks for Object Detection, section 3.
    """

    def __init__(self, body: FeaturePyramid, extra: ExtraFPNBlock | None = None) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), CHANNELS, extra)
        self.out_channels = CHANNELS

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


def pyramid_of(function: str, backbone: str | FeaturePyramid, maps: int, num_classes: int) -> FeaturePyramid:
    """Check the arguments of `function` and return the pyramid that it builds on.

    Args:
        function: its name, for messages.
        backbone: a pyramid, or the name of a network; iFormers that have a form with windows are in it.
        maps: how many the pyramid must return.
        num_classes: must be a positive integer.

    Raises:
        TypeError: `backbone` is neither a name nor a pyramid.
        ValueError: an unknown name, a pyramid of another number of maps, or no classes.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"{function}: num_classes must be a positive integer, got {num_classes!r}")
    if isinstance(backbone, str):
        windows: dict[str, Any] = dict(window_size=16) if backbone in iformer.WITH_WINDOWS else {}
        backbone = cast(
            FeaturePyramid, create_model(backbone, features_only=True, out_indices=maps, **windows)
        )
    if not isinstance(backbone, FeaturePyramid):
        raise TypeError(
            f"{function}: backbone must be a name or a FeaturePyramid, got {type(backbone).__name__}"
        )
    found = len(backbone.return_layers)
    if found != maps:
        raise ValueError(f"{function}: backbone must return {maps} maps, got a pyramid of {found}")
    return backbone

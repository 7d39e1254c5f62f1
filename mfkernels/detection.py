"""Detectors of torchvision over the pyramids of the networks; needs torchvision."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .fpn import CHANNELS, PyramidWithFPN, pyramid_of
from .models import FeaturePyramid, MobileFormer

__all__ = ["anchors", "mask_rcnn", "retinanet"]


def retinanet(backbone: str | FeaturePyramid, *, num_classes: int = 80, **options: Any) -> RetinaNet:
    """Create torchvision's RetinaNet over the last three maps of a network, with random weights.

    The feature pyramid network has 256 channels and five levels. Its two coarsest come from the last level
    for Mobile-Formers, and from the network's last map for the others, as in the papers.

    Args:
        backbone: a name of `list_models()`, or a pyramid of three maps: `create_model(name,
            features_only=True, out_indices=3, checkpoint=path)` for one with released weights. By name the
            attentions of iformer_m, iformer_l and iformer_l2 are in windows of 16.
        num_classes: of objects; labels are 0 to num_classes - 1.
        **options: torchvision's, for example `min_size`, `max_size`, `score_thresh`, and `anchor_generator`
            for objects of other sizes than COCO's, see `anchors`.

    Returns:
        The detector, in train mode. See `torchvision.models.detection.RetinaNet` for what it takes and
        returns.

    Raises:
        TypeError: `backbone` is neither a name nor a pyramid.
        ValueError: an unknown name, a pyramid of another number of maps, or no classes.

    Source: Mobile-Former, table 8; Dynamic Mobile-Former, the table of detectors on COCO.
    """
    body = pyramid_of("retinanet", backbone, 3, num_classes)
    on_output = isinstance(body.network, MobileFormer)
    extra = CoarseLevels(CHANNELS if on_output else body.feature_info.channels()[-1], CHANNELS)
    extra.use_P5 = on_output  # torchvision takes the output, too, when a map happens to have its channels
    return RetinaNet(PyramidWithFPN(body, extra), num_classes, **options)


def anchors(side: int = 32) -> AnchorGenerator:
    """Create the anchors of a RetinaNet: torchvision's own, but for the side of the smallest.

    An object is learned where an anchor overlaps it by half: of objects that are much smaller than the
    smallest anchor few are found.

    Args:
        side: of the smallest anchors in pixels, at least 4; each of five levels has twice that of the one
            before.

    Raises:
        ValueError: `side` is no integer of at least 4.
    """
    if isinstance(side, bool) or not isinstance(side, int) or side < 4:
        raise ValueError(f"anchors: side must be an integer of at least 4, got {side!r}")
    of_levels = [side * 2**level for level in range(5)]
    sizes = tuple(tuple(int(of_level * 2 ** (third / 3)) for third in range(3)) for of_level in of_levels)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)


def mask_rcnn(backbone: str | FeaturePyramid, *, num_classes: int = 80, **options: Any) -> MaskRCNN:
    """Create torchvision's Mask R-CNN over the four maps of a network, with random weights.

    The feature pyramid network has 256 channels and five levels, the coarsest pooled. Boxes and masks are
    predicted of objects alone: torchvision predicts them for the background, too, and never uses them.

    Args:
        backbone: a name of `list_models()`, or a pyramid of four maps; see `retinanet`.
        num_classes: of objects; labels are 1 to num_classes, 0 being the background.
        **options: torchvision's, for example `min_size`, `max_size`, `box_score_thresh`.

    Returns:
        The detector, in train mode. See `torchvision.models.detection.MaskRCNN` for what it takes and
        returns.

    Raises:
        TypeError: `backbone` is neither a name nor a pyramid.
        ValueError: an unknown name, a pyramid of another number of maps, or no classes.

    Source: Dynamic Mobile-Former and iFormer, the tables of Mask R-CNN on COCO.
    """
    body = pyramid_of("mask_rcnn", backbone, 4, num_classes)
    levels = PyramidWithFPN(body, LastLevelMaxPool())
    predictors = dict(
        box_predictor=_BoxPredictor(1024, num_classes), mask_predictor=_MaskPredictor(CHANNELS, num_classes)
    )
    return MaskRCNN(levels, **(predictors | options))


class CoarseLevels(LastLevelP6P7):
    """Make the two coarsest levels of a RetinaNet: torchvision's, but for the ReLU, which may be left out.

    Attributes:
        relu_before_p7: whether the coarsest is made of the other one's positive part.
    """

    relu_before_p7 = True

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        if self.relu_before_p7:
            return super().forward(p, c, names)
        sixth = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, sixth, self.p7(sixth)], [*names, "p6", "p7"]


class _BoxPredictor(FastRCNNPredictor):
    """Score all classes and the background, and predict the boxes of the classes."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores, F.pad(boxes, (4, 0))  # torchvision skips the first box, that of the background


class _MaskPredictor(MaskRCNNPredictor):
    """Predict the masks of the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 0, 0, 0, 1, 0))  # torchvision skips the background's mask

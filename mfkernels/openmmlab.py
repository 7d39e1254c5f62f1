"""Load checkpoints of mmdetection and mmsegmentation into torchvision's detectors and Semantic FPN.

This needs torchvision.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import roi_align

from .models import load_released
from .models.checkpoints import find_tensors, read_checkpoint
from .segmentation import SemanticFPN

__all__ = ["load_openmmlab"]

_NECK = [
    (r"^backbone\.", "backbone.body.network."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
]
_RETINANET = [
    (r"^neck\.fpn_convs\.3\.conv\.", "backbone.fpn.extra_blocks.p6."),
    (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.extra_blocks.p7."),
    *_NECK,
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"^bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"^bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
]
_MASK_RCNN = [
    *_NECK,
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
]
_SEMANTIC_FPN = [*_NECK, (r"^decode_head\.", "")]


def load_openmmlab(model: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> None:
    """Load a checkpoint of mmdetection or mmsegmentation, strictly.

    What differs there beside the names is seen to: the background, there the last class, becomes the first;
    and the model from now on has no ReLU before a RetinaNet's coarsest level, anchors that are not rounded
    and are the levels' strides apart, and reads a Mask R-CNN's regions to the half pixel, with as many
    samples as there are pixels.

    Args:
        model: of `detection.retinanet`, `detection.mask_rcnn` or `segmentation.semantic_fpn`.
        checkpoint: a path, or what is in the file: names and tensors, or these under "state_dict".

    Raises:
        TypeError: another model, or no state dict.
        ValueError: a name is missing or unknown, or a shape differs; all are listed by torchvision's names,
            and the model is left as it was.
        FileNotFoundError: no such file.

    Source: names as in mmdetection 2 and 3 (`RetinaHead`, `StandardRoIHead`) and mmsegmentation (`FPNHead`).
    """
    for kind, table in ((RetinaNet, _RETINANET), (MaskRCNN, _MASK_RCNN), (SemanticFPN, _SEMANTIC_FPN)):
        if isinstance(model, kind):
            names = table
            break
    else:
        raise TypeError(
            "load_openmmlab: model must be a RetinaNet, a MaskRCNN or a SemanticFPN, "
            f"got {type(model).__name__}"
        )
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    tensors = {_renamed(name, names): value for name, value in find_tensors(content).items()}
    for name in ("weight", "bias"):
        name = f"roi_heads.box_predictor.cls_score.{name}"
        if name in tensors:
            tensors[name] = tensors[name].roll(1, 0)
    load_released(model, tensors)
    if isinstance(model, RetinaNet):
        model.backbone.fpn.extra_blocks.relu_before_p7 = False
        scales = [2 ** (i / 3) for i in range(3)]
        model.anchor_generator = _Anchors(8, [[4 * scale for scale in scales]] * 5)
    elif isinstance(model, MaskRCNN):
        model.rpn.anchor_generator = _Anchors(4, [[8.0]] * 5)
        model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool = _Regions(7), _Regions(14)


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


class _Anchors(AnchorGenerator):
    """The anchors of mmdetection, three shapes of each size.

    Args:
        stride: of the finest level, in pixels; each coarser one has twice that of the one before.
        scales: of each level, the sizes of its anchors over its stride.
    """

    def __init__(self, stride: int, scales: list[list[float]]) -> None:
        self.strides = [stride * 2**level for level in range(len(scales))]
        sizes = tuple(
            tuple(scale * step for scale in of_level)
            for of_level, step in zip(scales, self.strides, strict=True)
        )
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(scales))

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        width, height = (sizes / roots).flatten(), (sizes * roots).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        exact = [
            [torch.full_like(side, step) for side in pair]
            for pair, step in zip(strides, self.strides, strict=True)
        ]
        return super().grid_anchors(grid_sizes, exact)


class _Regions(nn.Module):
    """Read regions from the level of their size, as mmdetection does.

    Regions whose mean side is less than 112 pixels come from the finest of four levels, those of less than
    224 from the next, and so on.

    Args:
        size: of what is read, in pixels.

    Inputs:
        the levels by name, the finest first; for each image the regions (n, 4), corners in its pixels; the
        images' sizes, which are not used.

    Returns:
        (regions of all images, C, size, size).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, levels: dict[str, Tensor], regions: list[Tensor], _: Any) -> Tensor:
        boxes = torch.cat([F.pad(of_image, (1, 0), value=i) for i, of_image in enumerate(regions)])
        sides = ((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])).sqrt()
        level_of = torch.log2(sides / 56 + 1e-6).floor().clamp(0, 3)
        finest = next(iter(levels.values()))
        out = finest.new_zeros(len(boxes), finest.shape[1], self.size, self.size)
        for level, x in enumerate(list(levels.values())[:4]):
            here = level_of == level
            # No number of samples: as many as a region has pixels.
            read = roi_align(x, boxes[here], self.size, 1 / (4 * 2**level), aligned=True)
            out[here] = read.to(out.dtype)
        return out

"""Boxes: their forms, their overlap, and what a detector's queries found as boxes in pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_shape, check_tensor
from .models import Detections

__all__ = ["corners", "generalized_iou", "postprocess"]


def corners(boxes: Tensor) -> Tensor:
    """Left, top, right and bottom (..., 4) of boxes given by centre, width and height (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(one: Tensor, other: Tensor) -> Tensor:
    """Compute the generalised intersection over union of boxes, in -1..1.

    Args:
        one, other: corners (..., 4), whose leading axes broadcast.

    Returns:
        (...).

    Source: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, algorithm 1.
    """

    def area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
        return (bottom_right - top_left).clamp(min=0).prod(-1)

    first, last = one.split(2, -1)
    other_first, other_last = other.split(2, -1)
    common = area(torch.maximum(first, other_first), torch.minimum(last, other_last))
    union = area(first, last) + area(other_first, other_last) - common
    around = area(torch.minimum(first, other_first), torch.maximum(last, other_last))
    return common / union - (around - union) / around


def postprocess(
    outputs: Detections, sizes: Sequence[tuple[int, int]] | Tensor, threshold: float = 0.5
) -> list[dict[str, Tensor]]:
    """Turn a detector's outputs into boxes in pixels, in the form of torchvision's detectors.

    A query's label is the class of its largest probability, its score. There is no suppression of boxes that
    overlap: each query was trained to find another object.

    Args:
        outputs: of an `EndToEndMobileFormer`.
        sizes: height and width of each image, in pixels, without padding; a list of pairs or (B, 2).
        threshold: queries with a score above it are returned; 0 for all of them.

    Returns:
        A dictionary for each image: `scores` (n), `labels` (n), int64, and `boxes` (n, 4), left, top, right
        and bottom; in the order of the queries.

    Raises:
        TypeError, ValueError: outputs of another shape, or sizes that are not one positive pair an image.

    Source: Carion et al., DETR, ECCV 2020.
    """
    logits = check_tensor("postprocess", "outputs.logits", outputs.logits, "B Q K")
    check_shape("postprocess", "outputs.boxes", outputs.boxes, "B Q 4", (*logits.shape[:2], 4))
    heights_widths = torch.as_tensor(sizes, device=logits.device)
    if heights_widths.shape != (len(logits), 2) or (heights_widths < 1).any():
        raise ValueError(
            f"postprocess: sizes must be a positive height and width for each of {len(logits)} images, "
            f"got {sizes}"
        )
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    boxes = corners(outputs.boxes) * heights_widths.flip(1).repeat(1, 2)[:, None]
    return [
        dict(scores=s[s > threshold], labels=of_image[s > threshold], boxes=b[s > threshold])
        for s, of_image, b in zip(scores, labels, boxes, strict=True)
    ]

"""The loss of the end-to-end detector: queries are matched with objects one to one; needs SciPy."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from .boxes import corners, generalized_iou
from .checks import check_shape, check_tensor
from .models import Detections

__all__ = ["DetectionLoss", "Weights", "detection_loss", "match"]

Target = Mapping[str, Tensor]


class Weights(NamedTuple):
    """Weigh the terms of the loss: classes, boxes' distance (L1) and their overlap (GIoU).

    The same weights count in matching. Another weight is that of queries that found no object, in the mean
    over queries.
    """

    classes: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


class DetectionLoss(NamedTuple):
    """Hold `total`, the weighted sum over all blocks, and terms of the last block.

    These terms, without weights, are `classes`, `l1` and `giou`. All are scalars.
    """

    total: Tensor
    classes: Tensor
    l1: Tensor
    giou: Tensor


def detection_loss(
    outputs: Detections, targets: Sequence[Target], weights: Weights | None = None
) -> DetectionLoss:
    """Compute DETR's loss, at every block of the detector.

    Queries are matched with objects anew for each block. The classes' loss is a cross entropy, a weighted
    mean over queries; the boxes' are sums over objects, divided by the number of objects: with
    `torch.distributed` by its mean over the processes, at least by 1.

    Args:
        outputs: of an `EndToEndMobileFormer`; computed in float32 at least.
        targets: for each image a dictionary of `labels` (n), int64, 0 to num_classes - 1, and `boxes` (n, 4),
            x and y of the centre, width and height in 0..1 of the image without its padding. n may be 0.
        weights: DETR's by default.

    Returns:
        `DetectionLoss`, under autograd.

    Raises:
        TypeError, ValueError: an argument that does not fit, named; outputs that are not finite.

    Source: Carion et al., DETR, ECCV 2020, section 3.1 and appendix A; Chen et al., Mobile-Former, section 4.
    """
    weights = weights or Weights()
    _check(outputs, targets)
    count = _mean_over_processes(sum(len(target["labels"]) for target in targets), outputs.logits)
    blocks = [_of_block(block, targets, count, weights) for block in (*outputs.auxiliary, outputs)]
    total = sum(weights.classes * c + weights.l1 * d + weights.giou * g for c, d, g in blocks)
    return DetectionLoss(torch.as_tensor(total), *blocks[-1])


@torch.no_grad()
def match(
    outputs: Detections, targets: Sequence[Target], weights: Weights | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Match queries with objects one to one, so that the sum of costs is least.

    Args:
        outputs, targets, weights: see `detection_loss`. The cost of a pair is the weighted sum of minus the
            probability of the object's class, the L1 distance of the boxes and minus their generalised IoU.

    Returns:
        For each image the queries and the objects of the pairs, both (min(queries, n)), int64.

    Raises:
        TypeError, ValueError: see `detection_loss`.
    """
    weights = weights or Weights()
    _check(outputs, targets)
    pairs = []
    for logits, boxes, target in zip(outputs.logits, outputs.boxes, targets, strict=True):
        logits, boxes = _wide(logits), _wide(boxes)
        theirs = target["boxes"].to(boxes)
        cost = (
            -weights.classes * logits.softmax(-1)[:, target["labels"]]
            + weights.l1 * torch.cdist(boxes, theirs, p=1)
            - weights.giou * generalized_iou(corners(boxes)[:, None], corners(theirs))
        )
        if not cost.isfinite().all():
            raise ValueError("match: outputs must be finite, got NaN or infinity")
        queries, objects = linear_sum_assignment(cost.cpu().numpy())
        pairs.append((torch.as_tensor(queries), torch.as_tensor(objects)))
    return pairs


def _of_block(
    outputs: Detections, targets: Sequence[Target], count: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    logits, boxes = _wide(outputs.logits), _wide(outputs.boxes)
    batch, queries, classes = logits.shape
    wanted = torch.full((batch, queries), classes - 1, device=logits.device)
    found, theirs = [], []
    for i, (of_queries, of_objects) in enumerate(match(outputs, targets, weights)):
        wanted[i, of_queries] = targets[i]["labels"][of_objects].to(wanted)
        found.append(boxes[i, of_queries])
        theirs.append(targets[i]["boxes"][of_objects].to(boxes))
    of_classes = logits.new_ones(classes)
    of_classes[-1] = weights.no_object
    classification = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), of_classes)
    pairs = torch.cat(found), torch.cat(theirs)
    distance = F.l1_loss(*pairs, reduction="sum") / count
    overlap = (1 - generalized_iou(corners(pairs[0]), corners(pairs[1]))).sum() / count
    return classification, distance, overlap


def _mean_over_processes(count: int, like: Tensor) -> Tensor:
    counted = torch.tensor(float(count), device=like.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counted)
        counted = counted / torch.distributed.get_world_size()
    return counted.clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: of differences of squares half precision keeps too little."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(outputs: Detections, targets: Sequence[Target]) -> None:
    name = "detection_loss"
    logits = check_tensor(name, "outputs.logits", outputs.logits, "B Q K")
    check_shape(name, "outputs.boxes", outputs.boxes, "B Q 4", (*logits.shape[:2], 4))
    batch, _, classes = logits.shape
    if len(targets) != batch or batch == 0:
        raise ValueError(f"{name}: targets must be one for each of {batch} images, got {len(targets)}")
    for i, target in enumerate(targets):
        _check_target(f"targets[{i}]", target, classes - 1)


def _check_target(name: str, target: Target, classes: int) -> None:
    if not isinstance(target, Mapping) or not {"labels", "boxes"} <= set(target):
        raise TypeError(
            f"detection_loss: {name} must be a dictionary with 'labels' and 'boxes', got {target!r}"
        )
    labels, boxes = target["labels"], target["boxes"]
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        found = (labels.dtype, tuple(labels.shape)) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"detection_loss: {name}['labels'] must be an int64 tensor of shape (n,), got {found}"
        )
    check_tensor("detection_loss", f"{name}['boxes']", boxes, "n 4")
    check_shape("detection_loss", f"{name}['boxes']", boxes, "n 4", (len(labels), 4))
    if ((labels < 0) | (labels >= classes)).any():
        raise ValueError(
            f"detection_loss: {name}['labels'] must be from 0 to {classes - 1}, got {labels.tolist()}"
        )
    edges = corners(boxes)
    # A box up to the image's border may be beyond it by rounding.
    if not ((edges >= -1e-3) & (edges <= 1 + 1e-3)).all() or not (boxes[:, 2:] > 0).all():
        raise ValueError(
            f"detection_loss: {name}['boxes'] must lie in the image, 0..1, with a positive width and height "
            f"after the centre, got {boxes.tolist()}"
        )

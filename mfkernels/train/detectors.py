"""Detectors as a training needs them: losses of images with boxes, and boxes of images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..boxes import postprocess
from ..demo import MEAN, STD
from ..detection import anchors, retinanet
from ..detection_loss import detection_loss
from ..models import create_model, list_detectors
from .detection_recipe import DetectionRecipe


class TrainedRetinaNet(nn.Module):
    """A RetinaNet in a training.

    Args:
        recipe: of the training.
        num_classes: of objects.
        weights: path of a classifier's weights for the backbone, or None.

    Inputs:
        images: a list of (3, H, W) in 0..1. `targets`: see `DetectionBatch`.

    Returns:
        The mean of the images' losses with `targets`; without, in eval mode, for each image a dictionary of
        `boxes` (n, 4), corners in pixels, `labels` and `scores` (n).
    """

    def __init__(self, recipe: DetectionRecipe, num_classes: int, weights: Path | None) -> None:
        super().__init__()
        pyramid: Any = create_model(recipe.model, features_only=True, out_indices=3, checkpoint=weights)
        self.detector = retinanet(
            pyramid, num_classes=num_classes, anchor_generator=anchors(recipe.anchor_side)
        )
        self.detector.transform = _NoResize(recipe.short_side, recipe.long_side, MEAN, STD)
        self.freeze_norms = recipe.freeze_norms
        self.frozen = pyramid.network.blocks[: recipe.frozen_blocks] if recipe.frozen_blocks else None
        if self.frozen is not None:
            self.frozen.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        return self.detector.backbone.body

    def train(self, mode: bool = True) -> "TrainedRetinaNet":
        super().train(mode)
        if self.freeze_norms:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = self.detector(images, targets)
        return found if targets is None else torch.stack(list(found.values())).sum()


class _NoResize(GeneralizedRCNNTransform):
    """Normalise and pad images that have their size already.

    torchvision's `_skip_resize` counts in training alone: in evaluation it would bring small images to 800.
    """

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


class TrainedEndToEnd(nn.Module):
    """An end-to-end detector in a training; see `TrainedRetinaNet`.

    The loss is DETR's, boxes divided by the mean number of objects of a process.
    """

    def __init__(self, recipe: DetectionRecipe, num_classes: int, weights: Path | None) -> None:
        super().__init__()
        self.freeze_norms = recipe.freeze_norms
        self.detector: Any = create_model(
            recipe.model, num_classes=num_classes, queries=recipe.queries, dropout=recipe.dropout
        )
        if weights is not None:
            classifier = create_model(
                recipe.model.removeprefix("e2e_"), features_only=True, checkpoint=weights
            )
            self.backbone.load_state_dict(classifier.state_dict())

    @property
    def backbone(self) -> Any:
        return self.detector.backbone

    def train(self, mode: bool = True) -> "TrainedEndToEnd":
        super().train(mode)
        if not self.freeze_norms:
            self.backbone.train(mode)  # the detector itself freezes them
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        batch, mask = _batched(images)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        found = self.detector(batch, mask)
        if targets is None:
            return postprocess(found, sizes, threshold=0.0)
        return detection_loss(found, [_relative(t, s) for t, s in zip(targets, sizes, strict=True)]).total


def create_detector(recipe: DetectionRecipe, num_classes: int, weights: Path | None = None) -> Any:
    """Return the recipe's detector.

    Raises:
        ValueError: weights that do not fit.
        FileNotFoundError: no such weights.
    """
    kind: Any = TrainedEndToEnd if recipe.model in list_detectors() else TrainedRetinaNet
    return kind(recipe, num_classes, weights)


def _batched(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the images normalised in one batch, and its padding; None where all have one size."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    like = images[0]
    mean, std = (torch.tensor(v, device=like.device)[:, None, None] for v in (MEAN, STD))
    batch = like.new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=like.device)
    for i, image in enumerate(images):
        inside = (i, slice(image.shape[1]), slice(image.shape[2]))
        batch[i, :, inside[1], inside[2]] = (image - mean) / std
        mask[inside] = False
    return batch, mask if mask.any() else None


def _relative(target: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Boxes as centre, width and height in 0..1 of the image."""
    boxes = target["boxes"] / target["boxes"].new_tensor([size[1], size[0]]).repeat(2)
    first, last = boxes.clamp(0, 1).split(2, -1)
    return dict(labels=target["labels"], boxes=torch.cat([(first + last) / 2, last - first], -1))

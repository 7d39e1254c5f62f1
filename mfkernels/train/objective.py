"""What a training makes small."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from .recipe import Recipe


def mixing(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function that mixes a batch's images (B, 3, H, W) and classes (B,) with other images'.

    The classes become shares, (B, num_classes), or stay what they are where the recipe mixes nothing.
    """
    ways: list[nn.Module] = []
    if recipe.mixup:
        ways.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
    if recipe.cutmix:
        ways.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
    if not ways:
        return lambda images, targets: (images, targets)
    return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)


class Objective(nn.Module):
    """The sum over a batch of cross entropies; with a teacher a part of it is to the class that it sees.

    Args:
        recipe: gives label smoothing and the teacher's part, alpha.
        teacher: a network in eval mode, (B, 3, H, W) to (B, classes), None where there is none.

    Inputs:
        outputs: (B, classes); with a teacher a pair of them, the second learns from it.
        images (B, 3, H, W), and targets: (B,) or (B, classes).

    Returns:
        a number.

    Source: Touvron et al., DeiT, ICML 2021, equation 3 (hard distillation).
    """

    def __init__(self, recipe: Recipe, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.smoothing, self.alpha, self.teacher = recipe.label_smoothing, recipe.distillation, teacher

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        own, taught = outputs if isinstance(outputs, tuple) else (outputs, None)
        loss = F.cross_entropy(own.float(), targets, label_smoothing=self.smoothing, reduction="sum")
        if self.teacher is None or taught is None:
            return loss
        with torch.no_grad():
            seen = self.teacher(images).argmax(-1)
        distilled = F.cross_entropy(taught.float(), seen, reduction="sum")
        return (1 - self.alpha) * loss + self.alpha * distilled

"""Recipes of trainings for detection."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..models import list_detectors, list_models
from .recipe import check_number, resolve, tables


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe:
    """The settings of a training for detection.

    The papers' settings come first; how it is computed, which should not change what is learned, comes last.
    A batch is that of a step, of all processes.
    """

    model: str  # an end-to-end detector, or the backbone of a RetinaNet
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: str = "adamw"  # or "sgd", with momentum 0.9
    backbone_lr: float = 1.0  # learning rate of the backbone over that of the rest
    warmup_steps: int = 0  # linear, of the learning rate, from a thousandth of it
    milestones: tuple[int, ...] = ()  # epochs after each of which the learning rate is a tenth
    clip_grad: float | None = None  # largest norm of all gradients together
    freeze_norms: bool = True  # the backbone's keep their statistics; wrong from random weights
    frozen_blocks: int = 0  # the first so many of a RetinaNet's DMF, which do not learn
    anchor_side: int = 32  # of a RetinaNet's smallest anchors in pixels
    queries: int = 100  # of an end-to-end detector
    dropout: float = 0.1  # of an end-to-end detector's head
    hflip: float = 0.5  # probability
    short_side: int = 800  # to which the shorter side is brought, in pixels, or
    long_side: int = 1333  # the longer side to this, if that is less
    seed: int = 0
    dtype: str = "float32"  # "bfloat16" for autocast
    workers: int = 4  # processes that read images, for each process that trains

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError, ValueError: a value that does not fit, named.
        """
        for name in ("epochs", "batch_size", "queries", "short_side", "long_side"):
            check_number(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay", "backbone_lr", "warmup_steps", "frozen_blocks", "workers"):
            check_number(name, getattr(self, name), 0)
        check_number("anchor_side", self.anchor_side, 4)
        for name in ("hflip", "dropout"):
            check_number(name, getattr(self, name), 0, 1)
        if self.clip_grad is not None:
            check_number("clip_grad", self.clip_grad, 0)
        if not isinstance(self.milestones, tuple) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"recipe: milestones must be growing epochs, got {self.milestones!r}")
        if self.frozen_blocks and not self.model.startswith("dmf_"):
            raise ValueError(f"recipe: frozen_blocks must be 0 for {self.model}, got {self.frozen_blocks}")
        for name, known in (
            ("model", (*list_detectors(), *list_models())),
            ("optimizer", ("adamw", "sgd")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"recipe: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )


def list_detection_recipes() -> list[str]:
    """Return the names that `load_detection_recipe` knows."""
    return list(_recipes())


def load_detection_recipe(name: str | Path, **changes: Any) -> DetectionRecipe:
    """Return a recipe for detection with some of its settings changed; see `load_recipe`.

    Raises:
        ValueError: an unknown name, setting or value.
        FileNotFoundError: no such file.
    """
    return resolve(DetectionRecipe, _recipes(), name, changes)


def step_learning_rate(recipe: DetectionRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a tenth after each milestone.

    Args:
        recipe: of the training.
        step: steps done before, since the beginning of the training.
        steps_per_epoch: steps of an epoch.
    """
    passed = sum(step >= epoch * steps_per_epoch for epoch in recipe.milestones)
    warm = min(1.0, 0.001 + 0.999 * step / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    return recipe.lr * warm * 0.1**passed


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    return tables("detection")

"""The released networks by name."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import dynamic_mobile_former, iformer, mobile_former
from .checkpoints import load_checkpoint, load_released
from .dynamic_mobile_former import DynamicMobileFormer, annealed_temperature
from .features import FeaturePyramid
from .iformer import IFormer
from .mobile_former import MobileFormer
from .timm_registry import register_with_timm

__all__ = [
    "DynamicMobileFormer",
    "FeaturePyramid",
    "IFormer",
    "MobileFormer",
    "annealed_temperature",
    "create_model",
    "list_models",
    "load_released",
    "register_with_timm",
]

_FAMILIES = {
    mobile_former.NAMES: mobile_former.create_mobile_former,
    dynamic_mobile_former.NAMES: dynamic_mobile_former.create_dynamic_mobile_former,
    iformer.NAMES: iformer.create_iformer,
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return [name for names in _FAMILIES for name in names]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    checkpoint: str | Path | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    **options: Any,
) -> nn.Module:
    """A released network, with random weights or those of a checkpoint.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        checkpoint: path of released weights, see `load_released` for what it may hold. Read with
            `torch.load(weights_only=True)`.
        features_only: a backbone, which returns the last map of each size: a `FeaturePyramid`.
        out_indices: which of these maps; a number: the last so many.
        **options: settings that replace those of the released model; see `MobileFormer`,
            `DynamicMobileFormer` and `IFormer`, for example `token_id=-1` (spatial-aware dynamic ReLU),
            `token_num`, `token_dim`, `ffn=False`, `mixing="mlp"`, `kernel_size=(5, 5)`, `image_size`,
            `dropout`, `drop_path`, `distillation=True`; of iFormer `window_size=16`, its form for detection
            and segmentation.

    Returns:
        The network, in train mode, as PyTorch's constructors return it.

    Raises:
        ValueError: an unknown name, a setting or a checkpoint that does not fit.
        FileNotFoundError: no file at `checkpoint`.
    """
    create = next((create for names, create in _FAMILIES.items() if name in names), None)
    if create is None:
        near = difflib.get_close_matches(str(name), list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"create_model: name must be one of {', '.join(list_models())}, got {name!r}{hint}")
    if out_indices is not None and not features_only:
        raise ValueError("create_model: out_indices needs features_only=True")
    model = create(name, num_classes=num_classes, **options)  # type: ignore[operator]
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return FeaturePyramid(model, out_indices) if features_only else model


if "timm" in sys.modules:
    register_with_timm()

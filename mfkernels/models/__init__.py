"""The released networks by name."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import dynamic_mobile_former, end_to_end, iformer, mobile_former
from .checkpoints import load_checkpoint, load_released
from .dynamic_mobile_former import DynamicMobileFormer, annealed_temperature
from .end_to_end import Detections, EndToEndMobileFormer
from .features import FeaturePyramid
from .iformer import IFormer
from .mobile_former import MobileFormer
from .timm_registry import register_with_timm

__all__ = [
    "Detections",
    "DynamicMobileFormer",
    "EndToEndMobileFormer",
    "FeaturePyramid",
    "IFormer",
    "MobileFormer",
    "annealed_temperature",
    "create_model",
    "list_detectors",
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
    """Return the names of networks for classification that `create_model` knows."""
    return [name for names in _FAMILIES for name in names]


def list_detectors() -> list[str]:
    """Return the names of detectors that `create_model` knows."""
    return list(end_to_end.NAMES)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    **options: Any,
) -> nn.Module:
    """Return a released network, with random weights or those of a checkpoint.

    Args:
        name: one of `list_models()` or `list_detectors()`.
        num_classes: outputs of the classifier, by default 1000; of a detector the classes of objects, by
            default 91.
        checkpoint: path of released weights, see `load_released` for what it may hold. Read with
            `torch.load(weights_only=True)`.
        features_only: a backbone, which returns the last map of each size: a `FeaturePyramid`.
        out_indices: which of these maps; a number n takes the last n.
        **options: settings that replace those of the released model; see `MobileFormer`,
            `DynamicMobileFormer` and `IFormer`, for example `token_id=-1` (spatial-aware dynamic ReLU),
            `token_num`, `token_dim`, `ffn=False`, `mixing="mlp"`, `kernel_size=(5, 5)`, `image_size`,
            `dropout`, `drop_path`, `distillation=True`; of iFormer `window_size=16`, its form for detection
            and segmentation; of detectors `queries`, and the ablations `spatial=False`, `scales=1`,
            `adapt_position=False` and `mobile_attention=False`, see `EndToEndMobileFormer`.

    Returns:
        The network, in train mode, as PyTorch's constructors return it.

    Raises:
        ValueError: an unknown name, a setting or a checkpoint that does not fit.
        FileNotFoundError: no file at `checkpoint`.
    """
    families = {**_FAMILIES, end_to_end.NAMES: end_to_end.create_end_to_end}
    create = next((create for names, create in families.items() if name in names), None)
    if create is None:
        known = [*list_models(), *list_detectors()]
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"create_model: name must be one of {', '.join(known)}, got {name!r}{hint}")
    if out_indices is not None and not features_only:
        raise ValueError("create_model: out_indices needs features_only=True")
    if num_classes is not None:
        options["num_classes"] = num_classes
    if features_only and name in end_to_end.NAMES:
        raise ValueError(f"create_model: features_only is of networks for classification, got {name}")
    model = create(name, **options)  # type: ignore[operator]
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return FeaturePyramid(model, out_indices) if features_only else model


if "timm" in sys.modules:
    register_with_timm()

"""The released networks by name."""

from pathlib import Path
from typing import Any

from torch import nn

from . import mobile_former
from .checkpoints import load_checkpoint, load_released
from .mobile_former import MobileFormer

__all__ = ["MobileFormer", "create_model", "list_models", "load_released"]


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(mobile_former.NAMES)


def create_model(
    name: str, *, num_classes: int = 1000, checkpoint: str | Path | None = None, **options: Any
) -> nn.Module:
    """A released network, with random weights or those of a checkpoint.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        checkpoint: path of released weights, see `load_released` for what it may hold. Read with
            `torch.load(weights_only=True)`.
        **options: settings that replace those of the released model; see `MobileFormer`, for example
            `token_id=-1` (spatial-aware dynamic ReLU), `token_num`, `token_dim`, `ffn=False`,
            `mixing="mlp"`, `kernel_size=(5, 5)`, `image_size`, `dropout`, `drop_path`.

    Returns:
        The network, in train mode, as PyTorch's constructors return it.

    Raises:
        ValueError: an unknown name, a setting or a checkpoint that does not fit.
        FileNotFoundError: no file at `checkpoint`.
    """
    if name not in list_models():
        raise ValueError(f"create_model: name must be one of {', '.join(list_models())}, got {name!r}")
    model = mobile_former.create_mobile_former(name, num_classes=num_classes, **options)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model

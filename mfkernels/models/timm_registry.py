"""The networks in the registry of timm."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__: list[str] = []  # timm adds the names

_SETTINGS = {"in_chans": "in_channels", "drop_rate": "dropout", "drop_path_rate": "drop_path"}


def register_with_timm() -> None:
    """Register the networks with `timm.create_model`, by their names.

    Where timm has a network of that name, as newer ones have of iFormer, ours has "mfkernels_" before it.
    This happens when mfkernels is imported after timm; importing timm takes long, so in the other order call
    this function.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from timm.models import is_model, model_entrypoint, register_model

    from . import list_models

    for name in list_models():
        for key in (name, f"mfkernels_{name}"):
            if not is_model(key):
                register_model(_entry(name, key))
            if model_entrypoint(key).__module__ == __name__:
                break


def _entry(name: str, key: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **settings: Any) -> nn.Module:
        from . import create_model

        if pretrained:
            raise ValueError(
                f"{name}: no weights can be downloaded; pass the path of released ones with checkpoint="
            )
        given = {_SETTINGS.get(key, key): value for key, value in settings.items()}
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable"):
            given.pop(key, None)
        return create_model(name, **given)

    create.__name__ = create.__qualname__ = key
    return create

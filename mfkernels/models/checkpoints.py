"""Loading of released checkpoints."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .iformer import IFormer
from .timm_names import timm_name

# Where training scripts keep the weights, in the order in which we look. Weights averaged over training
# (EMA) come last: a file with both was saved for its "state_dict" or "model".
_KEYS = ("state_dict", "model", "state_dict_ema", "model_ema")


def load_released(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load released weights into `model`, strictly.

    Args:
        model: a model of `create_model`, or any part of one.
        state_dict: names and tensors, or a checkpoint that holds them under "state_dict", "model",
            "state_dict_ema" or "model_ema" (looked for in this order). A prefix "module." is removed. For an
            `IFormer` it may be one of timm's iFormer, too, which has other names.

    Raises:
        TypeError: no state dict in `state_dict`.
        ValueError: a name is missing or unknown, or a shape differs; all of them are listed, and the model
            is left as it was. Only `num_batches_tracked`, counters that very old files lack, may be missing.
    """
    tensors = find_tensors(state_dict)
    expected = model.state_dict()
    if isinstance(model, IFormer):
        ours = {timm_name(name): name for name in expected}
        tensors = {ours.get(name, name): value for name, value in tensors.items()}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in tensors and name not in counters]
    unknown = [name for name in tensors if name not in expected]
    shapes = [
        f"{name}: {tuple(tensors[name].shape)}, the model has {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{title} ({len(lines)}):\n  " + "\n  ".join(lines)
            for title, lines in (("missing", missing), ("unknown", unknown), ("other shapes", shapes))
            if lines
        ]
        raise ValueError(
            f"load_released: the state dict does not fit {type(model).__name__}\n" + "\n".join(parts)
        )
    model.load_state_dict({name: tensors.get(name, expected[name]) for name in expected})


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """`load_released` from a file that `torch.save` wrote; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `load_released`; and a file that holds more than tensors and plain data.
    """
    load_released(model, read_checkpoint(path))


def read_checkpoint(path: str | Path) -> Any:
    """Return what `torch.save` wrote into a file; see `load_checkpoint`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        # The released training scripts save their command line with the weights: a Namespace of plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint: {path} cannot be read with weights_only=True: {error}") from error
    return content


def find_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the names and tensors of a checkpoint; see `load_released`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_released: state_dict must be a mapping, got {type(state_dict).__name__}")
    for key in _KEYS:
        if isinstance(state_dict.get(key), Mapping):
            return find_tensors(state_dict[key])
    others = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if others or not state_dict:
        raise TypeError(
            "load_released: expected names and tensors, or a checkpoint with them under "
            f"{', '.join(_KEYS)}; got {f'other values at {others[:5]}' if others else 'an empty mapping'}"
        )
    prefix = "module."
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return dict(state_dict)

"""The files of a training from which it goes on."""

import os
import sys
from pathlib import Path
from typing import Any

import torch


def save(folder: Path, state: dict[str, Any], epoch: int, step: int, keep: int) -> bool:
    """Write a checkpoint and remove all but the last `keep`; say so and return False where there is no room.

    It is written beside and renamed, so that no reader ever sees half of it, and nothing is removed before.
    """
    if not _write(folder / f"checkpoint-{epoch:05d}-{step:07d}.pt", state):
        return False
    for old in _all(folder)[:-keep]:
        old.unlink()
    return True


def save_weights(path: Path, weights: dict[str, Any]) -> bool:
    """Write weights as `mfkernels.models.create_model(checkpoint=...)` reads them."""
    return _write(path, {"model": weights})


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Return what the newest readable checkpoint holds, None where there is none.

    Name the checkpoints that cannot be read.
    """
    for path in reversed(_all(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            print(f"{path} cannot be read, the one before it is taken: {error}", file=sys.stderr, flush=True)
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))


def _write(path: Path, content: Any) -> bool:
    beside = path.with_suffix(".partial")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer makes a RuntimeError of a full disk
        beside.unlink(missing_ok=True)
        print(f"{path} could not be written, the training goes on: {error}", file=sys.stderr, flush=True)
        return False
    return True

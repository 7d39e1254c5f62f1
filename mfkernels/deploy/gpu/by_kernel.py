"""Choose between a Triton kernel of deployed networks and its definition."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def has_kernels(x: Tensor) -> bool:
    """Return whether kernels run where `x` is."""
    return x.is_cuda


def by_kernel(module: str, reference: Callable[..., Any], *arguments: Any) -> Any:
    """Run the kernel of this package's module that has the definition's name, or on a CPU the definition.

    Args:
        module: its name.
        reference: the definition; its name ends in "_reference".
        arguments: of both; the first is a tensor.
    """
    x = arguments[0]
    if not has_kernels(x):
        return reference(*arguments)
    # Imported when it is needed: importing Triton takes its time, and it may not be there.
    found = importlib.import_module(f"{__package__}.{module}")
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return getattr(found, reference.__name__.removesuffix("_reference"))(*arguments)

"""Runs the Triton kernels of an operator, `operators/<op>/triton.py`, where PyTorch finds CUDA tensors."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

# Looked up once: torch.compile cannot trace a look into the file system.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def register_triton(op: str) -> None:
    """For CUDA tensors run the functions `forward` and `backward` of `operators/<op>/triton.py`.

    That is imported when it is first called: importing Triton takes its time, and it may not be there.
    """
    for name, function in _functions(op):
        torch.library.impl(f"mfkernels::{name}", "cuda")(function)


def _functions(op: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    def run(kind: str, *arguments: Any, **others: Any) -> Any:
        module = importlib.import_module(f"{__package__}.{op}.triton")
        device = next(x for x in arguments if isinstance(x, torch.Tensor)).device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return getattr(module, kind)(*arguments, **others)

    for kind, suffix in (("forward", ""), ("backward", "_backward")):
        yield op + suffix, lambda *arguments, kind=kind, **others: run(kind, *arguments, **others)


# The operators that have CUDA C++ kernels, `torch.ops.mfkernels_cuda.<op>`, for the forward pass.
CUDA_OPERATORS = ("former_block",)


@contextmanager
def _instead(functions: Iterable[tuple[str, Callable[..., Any]]], key: str) -> Iterator[None]:
    """Within the `with` block the operators of these names run these functions for a kind of tensors."""
    library = torch.library.Library("mfkernels", "IMPL")
    try:
        for name, function in functions:
            with warnings.catch_warnings():  # that they were there before
                warnings.simplefilter("ignore")
                library.impl(name, function, key, allow_override=True)
        yield
    finally:
        library._destroy()


def cuda_kernels() -> AbstractContextManager[None]:
    """Within the `with` block the operators that have CUDA C++ kernels run these instead of Triton's."""
    found = [(name, getattr(torch.ops.mfkernels_cuda, name).default) for name in CUDA_OPERATORS]
    return _instead(found, "CUDA")


def triton_on_cpu() -> AbstractContextManager[None]:
    """Within the `with` block the operators run their Triton kernels on CPU tensors, too: interpreted."""
    names = [file.parent.name for file in Path(__file__).parent.glob("*/triton.py")]
    return _instead((pair for name in names for pair in _functions(name)), "CPU")

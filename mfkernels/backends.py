"""Which implementation of an operator runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# A module global, not a thread-local: torch.compile guards on globals, and would silently keep the old
# choice of a thread-local or a context variable.
_backend = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators of `mfkernels.ops` on one backend inside the `with` block.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (our C++ kernels), "triton", "cuda", or
            "auto" (the default: the fastest that can run; "reference" where there is no kernel).
            The choice holds for the whole process, as PyTorch's own backend flags do.

    Raises:
        ValueError: `name` is not one of these. A backend that cannot run an operator raises
            `RuntimeError` when that operator is called, with the reason for every backend.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    before = _backend
    _backend = name
    try:
        yield
    finally:
        _backend = before


def current_backend() -> str:
    """The name given to the innermost `use_backend`, "auto" outside of any."""
    return _backend


_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run anything in this installation; None if it can."""
    if backend in ("reference", "cpu"):
        return None
    return f"mfkernels has no {'Triton' if backend == 'triton' else 'CUDA'} kernels yet"


def why_not(backend: str, x: Tensor) -> str | None:
    """Why `backend` cannot run on a tensor like `x`; None if it can."""
    if backend == "cpu":
        if x.device.type not in ("cpu", "meta"):
            return f"runs on CPU tensors, got device {x.device}"
        if x.dtype not in _CPU_DTYPES:
            return f"runs in float32, float64 and bfloat16, got {x.dtype}"
    return unavailable(backend)


def use_kernels(op: str, x: Tensor) -> bool:
    """True where `torch.ops.mfkernels.<op>` is to run, False where the reference is."""
    if _backend == "auto":
        return why_not("cpu", x) is None
    if _backend == "reference":
        return False
    if why_not(_backend, x) is None:
        return True
    lines = [f"{name}: {why_not(name, x) or 'can run'}" for name in BACKENDS if name != "auto"]
    raise RuntimeError(f"{op}: the backend {_backend!r} cannot run this call. " + "; ".join(lines))

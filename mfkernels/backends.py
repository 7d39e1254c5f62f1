"""Which implementation of an operator runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .native import CUDA_LACKS
from .operators.dispatch import (
    CUDA_OPERATORS,
    TRITON_INSTALLED,
    cuda_kernels,
    triton_interpreted,
    triton_on_cpu,
)

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# A module global, not a thread-local: torch.compile guards on globals, and would silently keep the old
# choice of a thread-local or a context variable.
_backend = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators of `mfkernels.ops` on one backend inside the `with` block.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (our C++ kernels), "triton", "cuda", or
            "auto" (the default: the fastest that can run; "reference" where there is no kernel; other
            operators where they are faster on a CPU: PyTorch's for `former_block` of many tokens and deep
            `dynamic_conv2d` without AVX-512, our convolution and norm for `pointwise_conv_bn` with
            gradients). "cuda",
            C++ kernels for CUDA devices, has `former_block` alone, and is chosen by name alone: it has not
            been measured yet.
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
    kernels: AbstractContextManager[None] = nullcontext()
    if name == "triton" and triton_interpreted():
        kernels = triton_on_cpu()
    elif name == "cuda" and unavailable(name) is None:
        kernels = cuda_kernels()
    try:
        with kernels:
            yield
    finally:
        _backend = before


def current_backend() -> str:
    """Return the name given to the innermost `use_backend`, "auto" outside of any."""
    return _backend


CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run anything in this installation; None if it can."""
    if backend == "cuda":
        return CUDA_LACKS
    if backend == "triton" and not TRITON_INSTALLED:
        return "Triton is not installed"
    return None


def why_not(backend: str, x: Tensor) -> str | None:
    """Why `backend` cannot run the operators on a tensor like `x`; None if it can."""
    if backend == "cpu":
        if x.device.type not in ("cpu", "meta"):
            return f"runs on CPU tensors, got device {x.device}"
        if x.dtype not in CPU_DTYPES:
            return f"runs in float32, float64 and bfloat16, got {x.dtype}"
    if backend == "cuda" and CUDA_LACKS is None:
        if x.device.type != "cuda":
            return f"runs on CUDA tensors, got device {x.device}"
        if x.dtype not in _TRITON_DTYPES:
            return f"runs in float32, bfloat16 and float16, got {x.dtype}"
    if backend == "triton":
        if x.device.type != "cuda" and not triton_interpreted():
            return f"runs on CUDA tensors, got device {x.device}"
        if x.dtype not in _TRITON_DTYPES:
            return f"runs in float32, bfloat16 and float16, got {x.dtype}"
    return unavailable(backend)


def use_kernels(op: str, x: Tensor) -> bool:
    """Return True where `torch.ops.mfkernels.<op>` is to run, False where the reference is."""
    if _backend == "auto":
        if x.is_cpu:
            return x.dtype in CPU_DTYPES  # what why_not says, in a tenth of the time
        return why_not("triton" if x.device.type == "cuda" else "cpu", x) is None
    if _backend == "reference":
        return False

    def reason(name: str) -> str | None:
        lacks = name == "cuda" and op not in CUDA_OPERATORS
        return why_not(name, x) or (f"has no kernel for {op}" if lacks else None)

    if reason(_backend) is None:
        return True
    lines = [f"{name}: {reason(name) or 'can run'}" for name in BACKENDS if name != "auto"]
    raise RuntimeError(f"{op}: the backend {_backend!r} cannot run this call. " + "; ".join(lines))

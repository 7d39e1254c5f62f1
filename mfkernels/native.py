"""Loads the compiled library, `libmfkernels`, and says what it is."""

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libmfkernels.so")

if not LIBRARY.exists():
    raise ImportError(
        f"mfkernels is not built: {LIBRARY.name} is missing from {LIBRARY.parent}. "
        "Type `pip install . --no-build-isolation` in the source folder."
    )

torch.ops.load_library(LIBRARY)

from . import _C  # noqa: E402  (needs libmfkernels, which needs torch)

# Built only beside a PyTorch with CUDA; another one may have been installed since.
CUDA_LIBRARY = LIBRARY.with_name("libmfkernels_cuda.so")
CUDA_LACKS: str | None = None  # why there are no CUDA kernels
if not CUDA_LIBRARY.exists():
    CUDA_LACKS = f"built without CUDA kernels, {_C.build_info()['cuda']}"
elif torch.version.cuda is None:
    CUDA_LACKS = "this PyTorch is built without CUDA"
else:
    torch.ops.load_library(CUDA_LIBRARY)

ISAS = ("generic", "avx2", "avx2vnni", "avx512", "avx512vnni", "amx", "dotprod", "i8mm")


def instruction_set() -> str:
    """Return the instruction set whose kernels run, a name of `ISAS`.

    With "avx2vnni" and "avx512vnni" products of networks that `deploy` made in int8 run by VNNI, all else is
    that of "avx2" and "avx512". "amx" is "avx512vnni", and products of networks in bfloat16 and in int8 run
    by AMX. On Arm, "dotprod" and "i8mm" are "generic", and products of networks in int8 run by these
    instructions; "i8mm" allows bfloat16, too, where the processor multiplies it.
    """
    return _C.instruction_set()


def supported_instruction_sets() -> list[str]:
    """Those that were built and that this machine can run, slowest first."""
    return [name for name in ISAS if _C.supports(name)]


def set_instruction_set(name: str) -> None:
    """Choose the instruction set, for the whole process; MFKERNELS_ISA does the same at import.

    Raises:
        ValueError: not the name of one.
        RuntimeError: this machine cannot run it, or this build does not have it.
    """
    if name not in ISAS:
        raise ValueError(f"instruction set (MFKERNELS_ISA) must be one of {', '.join(ISAS)}, got {name!r}")
    if not _C.supports(name):
        raise RuntimeError(
            f"instruction set (MFKERNELS_ISA) {name!r} cannot run here; "
            f"this machine and build can run: {', '.join(supported_instruction_sets())}"
        )
    _C.set_instruction_set(name)


if os.environ.get("MFKERNELS_ISA"):
    set_instruction_set(os.environ["MFKERNELS_ISA"])

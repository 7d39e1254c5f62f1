"""Builds CUDA kernels for the emulator, `tests/cuda/emulator.h`, and says what went wrong there."""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "cuda"
CXX = os.environ.get("CXX", "c++").split()
# Calls of the sanitizers end in the emulator: their own libraries are not linked.
WATCHED = ["-fsanitize=thread,alignment"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-DMFK_EMULATED", f"-I{FOLDER}"]


def build(source: Path, target: Path, *flags: str) -> ctypes.CDLL:
    """The library of a source file; `-g` among the flags has lines told."""
    compiled = target.with_suffix(".o")
    subprocess.run([*CXX, *FLAGS, *WATCHED, *flags, "-c", "-o", compiled, source], check=True)
    subprocess.run([*CXX, "-shared", "-o", target, compiled, "-ldl"], check=True)
    library = ctypes.CDLL(target)
    library.emulator_failure.restype = ctypes.c_char_p
    return library


def failure(library: ctypes.CDLL) -> str:
    """What went wrong in the last launch, with lines of the sources; empty: nothing did."""
    said = library.emulator_failure().decode()
    return re.sub(r"{(0x\w+)}", lambda match: _line(library._name, match[1]), said)


def _line(library: str, address: str) -> str:
    command = ["addr2line", "-i", "-e", library, address]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return address
    # Innermost first, then where that was called; "(discriminator 2)" may follow.
    own = [line.split(" ")[0] for line in lines if "/cuda/" in line]
    return " < ".join(Path(line).name for line in own)


def name_of(dtype: torch.dtype) -> str:
    """As it stands in the names of the libraries' functions."""
    return str(dtype).removeprefix("torch.")

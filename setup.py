"""Builds the C++ part with CMake and Ninja; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def stop(message: str) -> None:
    print(f"mfkernels: {message}", file=sys.stderr)
    raise SystemExit(1)


def require_torch():
    try:
        import torch
    except ImportError:
        stop(
            "no PyTorch to build against: type `pip install 'torch>=2.10'`, "
            "then `pip install . --no-build-isolation`"
        )
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 10):
        stop(f"PyTorch >= 2.10 is needed, found {torch.__version__}: type `pip install -U 'torch>=2.10'`")
    return torch


def require_cmake() -> str:
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        stop("no CMake: type `pip install cmake ninja`")
    return cmake


def with_cuda(torch) -> str:
    """Whether CUDA sources are to be built; says in one line why not."""
    nvcc = shutil.which("nvcc")
    wanted = os.environ.get("MFKERNELS_CUDA")
    if wanted not in (None, "", "0", "1"):
        stop(f"MFKERNELS_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "1" and nvcc is None:
        stop("MFKERNELS_CUDA=1, but no nvcc was found")
    if wanted == "0":
        reason = "MFKERNELS_CUDA=0"
    elif wanted != "1" and torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    elif nvcc is None:
        reason = "no nvcc was found"
    elif not any((ROOT / "csrc").glob("cuda/*.cu")):
        reason = "this version has no CUDA sources"
    else:
        return "yes"
    print(f"mfkernels: built without CUDA kernels: {reason}")
    return f"no: {reason}"


class CMakeBuild(build_ext):
    def run(self):
        torch = require_torch()
        cmake = require_cmake()
        # For an editable install (inplace) the libraries go beside the sources.
        out = ROOT / "mfkernels" if self.inplace else Path(self.build_lib).resolve() / "mfkernels"
        torch_root = Path(torch.__file__).parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "MFK_TORCH_INCLUDE": torch_root / "include",  # pybind11's headers are in there too
            "MFK_TORCH_LIB": torch_root / "lib",
            "MFK_TORCH_VERSION": torch.__version__,
            "MFK_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "MFK_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "MFK_CUDA": with_cuda(torch),
            "MFK_SANITIZE": os.environ.get("MFKERNELS_SANITIZE", ""),
        }
        command = [cmake, "-S", str(ROOT), "-B", str(build)]
        if shutil.which("ninja"):
            command += ["-G", "Ninja"]
        subprocess.run([*command, *(f"-D{k}={v}" for k, v in options.items())], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


setup(
    # Named so that the wheel is a binary one; CMake builds it.
    ext_modules=[Extension("mfkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

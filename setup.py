"""Builds the C++ part with CMake and Ninja; everything else about the package is in pyproject.toml."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "libmfkernels_cuda.so"


def stop(message: str) -> NoReturn:
    print(f"mfkernels: {message}", file=sys.stderr)
    raise SystemExit(1)


def require_torch() -> SimpleNamespace:
    """Return the folder and the versions of PyTorch, without importing it.

    Its headers and libraries suffice, without the gigabytes that a CUDA build of it needs to run.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop(
            "no PyTorch to build against: type `pip install 'torch>=2.10'`, "
            "then `pip install . --no-build-isolation`"
        )
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    release = tuple(int(part) for part in version["__version__"].split("+")[0].split(".")[:2])
    torch = SimpleNamespace(folder=folder, version=version["__version__"], cuda=version["cuda"])
    if release < (2, 10):
        stop(f"PyTorch >= 2.10 is needed, found {torch.version}: type `pip install -U 'torch>=2.10'`")
    return torch


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def require_cmake() -> str:
    return find_program("cmake") or stop("no CMake: type `pip install cmake ninja`")


def with_cuda(torch: SimpleNamespace) -> str:
    """Whether CUDA sources are to be built; says in one line why not."""
    nvcc = shutil.which("nvcc")
    wanted = os.environ.get("MFKERNELS_CUDA")
    if wanted not in (None, "", "0", "1"):
        stop(f"MFKERNELS_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "1" and nvcc is None:
        stop("MFKERNELS_CUDA=1, but no nvcc was found")
    if wanted == "0":
        reason = "MFKERNELS_CUDA=0"
    elif wanted != "1" and torch.cuda is None:
        reason = "this PyTorch is built without CUDA"
    elif nvcc is None:
        reason = "no nvcc was found"
    elif not any((ROOT / "csrc").glob("cuda/*.cu")):
        reason = "this version has no CUDA sources"
    else:
        return "yes"
    print(f"mfkernels: built without CUDA kernels: {reason}")
    return f"no: {reason}"


def build_folder(tool: str) -> Path:
    """Return CMake's folder, one for a build tool, a compiler and a choice of sanitizers.

    It stays: most objects depend on neither PyTorch nor Python, and serve builds for others of them.
    """
    words = ["cmake", tool, os.environ.get("CXX", ""), os.environ.get("MFKERNELS_SANITIZE", "")]
    return ROOT / "build" / "-".join(re.findall(r"[\w+.]+", " ".join(words)))


def put(product: Path, out: Path) -> None:
    """Copy it into a new file: a process may have the old one loaded."""
    out.mkdir(parents=True, exist_ok=True)
    (out / product.name).unlink(missing_ok=True)
    shutil.copy2(product, out)


class CMakeBuild(build_ext):
    def run(self):
        torch = require_torch()
        cmake, ninja = require_cmake(), find_program("ninja")
        cuda = with_cuda(torch)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        build = build_folder("ninja" if ninja else "make")
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "lib",
            "MFK_TORCH_INCLUDE": torch.folder / "include",  # pybind11's headers are in there too
            "MFK_TORCH_LIB": torch.folder / "lib",
            "MFK_TORCH_VERSION": torch.version,
            "MFK_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "MFK_EXT_SUFFIX": suffix,
            "MFK_CUDA": cuda,
            "MFK_SANITIZE": os.environ.get("MFKERNELS_SANITIZE", ""),
        }
        command = [cmake, "-S", str(ROOT), "-B", str(build)]
        if ninja:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([*command, *(f"-D{k}={v}" for k, v in options.items())], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        # For an editable install (inplace) the libraries go beside the sources.
        out = ROOT / "mfkernels" if self.inplace else Path(self.build_lib).resolve() / "mfkernels"
        put(build / "lib" / "libmfkernels.so", out)
        put(build / "lib" / f"_C{suffix}", out)
        if cuda == "yes":
            put(build / "lib" / CUDA_LIBRARY, out)
        else:
            (out / CUDA_LIBRARY).unlink(missing_ok=True)  # of an earlier build


setup(
    # Named so that the wheel is a binary one; CMake builds it.
    ext_modules=[Extension("mfkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

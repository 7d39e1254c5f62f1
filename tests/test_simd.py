"""The vectors under the CPU kernels: tests/simd.cpp, for each instruction set whose vectors differ."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mfkernels import _C

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++").split()
# Those of the build, and the ones of `mfkernels.native` that need the same processor.
ISAS = {"generic": "generic", "avx2": "avx2", "avx512": "avx512", "avx512bf16": "avx512", "neonbf16": "i8mm"}


def flags(isa: str) -> list[str]:
    """Those with which the build compiles kernels for an instruction set."""
    build = (ROOT / "CMakeLists.txt").read_text()
    own = dict(re.findall(r"set\(MFK_FLAGS_(\w+) (.*)\)", build))
    while "${" in own.get(isa, ""):
        own[isa] = re.sub(r"\${MFK_FLAGS_(\w+)}", lambda match: own[match[1]], own[isa])
    shared = re.search(r"<COMPILE_LANGUAGE:CXX>:(-Wall.*?)>", build)[1].split(";")
    return ["-std=gnu++17", "-O2", *shared, *own.get(isa, "").split(), f"-DMFK_ISA={isa}"]


@pytest.mark.parametrize("isa", ISAS)
def test_vectors(isa, tmp_path):
    if not _C.supports(ISAS[isa]) or (isa.endswith("bf16") and not _C.bf16_supported()):
        pytest.skip(f"this machine cannot run {isa} kernels")
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"there is no compiler {CXX[0]}")
    program, sources = tmp_path / "simd", [ROOT / "tests" / "simd.cpp", ROOT / "csrc" / "task_memory.cpp"]
    subprocess.run([*CXX, *flags(isa), "-o", program, *sources], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

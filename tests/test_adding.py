"""The page on adding an operator: what it says is enough, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding_an_operator.md"
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
PROMISES = "chosen_shapes or integers_are_exact or gradcheck or same_bits"
RUN = """
import sys, torch
torch.ops.load_library("libchannel_scale.so")
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "-k", sys.argv[1], "tests/test_contract.py"]))
"""


def files_of_the_page() -> dict[str, str]:
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE.read_text(), re.DOTALL))


@pytest.fixture
def copied(tmp_path):
    """Copy what an operator needs of the repository, and add the operator of the page."""
    for folder in ("mfkernels", "csrc", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "data", "recipes")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in files_of_the_page().items():
        assert not (tmp_path / path).exists()
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    ops = tmp_path / "mfkernels" / "ops.py"
    named = ops.read_text().replace("__all__ = [", '__all__ = [\n    "channel_scale",')
    ops.write_text(f"from .operators.channel_scale import channel_scale\n{named}")
    return tmp_path


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_operator_of_the_page_keeps_its_promises(copied):
    torch_folder = Path(torch.__file__).parent
    sources = (
        "csrc/ops/channel_scale.cpp",
        "csrc/cpu/operators/channel_scale.cpp",
        "csrc/isa.cpp",
        "csrc/task_memory.cpp",
    )
    subprocess.run(
        [
            *(COMPILER, "-std=gnu++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
            *("-Werror", "-Wno-psabi", "-Wl,-Bsymbolic"),
            *("-DMFK_GENERIC_ONLY", "-DMFK_ISA=generic", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *("-isystem", str(torch_folder / "include"), *sources, "-o", "libchannel_scale.so"),
            *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
        ],
        cwd=copied,
        check=True,
    )
    run = subprocess.run(
        [sys.executable, "-c", RUN, f"channel_scale and (generic and ({PROMISES}) or opcheck or layer_has)"],
        cwd=copied,
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20

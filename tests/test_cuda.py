"""The CUDA kernels without a GPU: on an emulator, against the truth; and compiled, where nvcc is, for the
GPUs that they are written for, without spilling registers."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import former_block
from test_contract import LAYOUTS, Comparison, expect
from tolerance import Errors

import mfkernels

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++").split()
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library of a file of `tests/cuda`, built once."""
    built: dict[str, ctypes.CDLL] = {}

    def library(name: str) -> ctypes.CDLL:
        if name not in built:
            target = tmp_path_factory.mktemp("cuda") / f"{name}.so"
            source = ROOT / "tests" / "cuda" / f"{name}.cpp"
            flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DMFK_EMULATED", f"-I{source.parent}"]
            subprocess.run([*CXX, *flags, "-o", target, source], check=True)
            built[name] = ctypes.CDLL(target)
        return built[name]

    return library


def run_former(library, tensors: dict, num_heads: int, form: str, eps: float, backwards: bool):
    tokens, *weights = [None if t is None else t.contiguous() for t in tensors.values()]
    weights += [None] * (12 - len(weights))
    hidden = 0 if tensors.get("fc1_weight") is None else tensors["fc1_weight"].shape[0]
    out = torch.full_like(tokens, float("nan"))
    pointers = (ctypes.c_void_p * 12)(*(None if t is None else t.data_ptr() for t in weights))
    failed = library.former_block(
        ctypes.c_void_p(tokens.data_ptr()), ctypes.c_void_p(out.data_ptr()), pointers, *tokens.shape,
        num_heads, hidden, int(form == "standard"), ctypes.c_float(eps), int(backwards),
    )  # fmt: skip
    assert not failed, "threads waited for others that never came, or wrote beyond their memory"
    return out


@pytest.mark.parametrize("shape", former_block.CHOSEN, ids=str)
def test_former_block_emulated(emulated, shape):
    """The one tolerance; and the same bits in whatever order the threads run."""
    if 0 in (shape["B"], shape["T"]):
        pytest.skip("nothing to launch")
    errors = Errors()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        expected = expect(former_block, former_block.make(shape, generator), generator, torch.float32)
        given = {k: None if v is None else v.float() for k, v in expected.sample.tensors.items()}
        others = dict(num_heads=4, form="released", eps=1e-5) | expected.sample.others
        first, second = (run_former(emulated("former_block"), given, **others, backwards=b) for b in (0, 1))
        assert torch.equal(first, second)
        errors.reference(expected.eager["output 0"], expected.truth["output 0"])
        errors.kernel(first, expected.truth["output 0"])
        if first.numel() > 5000:
            break
    errors.check(f"former_block {shape}")


def test_the_emulator_sees_lost_barriers(tmp_path):
    """Without any one of its barriers the kernel gives other numbers, or none."""
    text = (ROOT / "csrc" / "cuda" / "former_block.cuh").read_text()
    barriers = [match.start() for match in re.finditer(r"__syncthreads\(\);", text)]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests" / "cuda", tmp_path / "tests" / "cuda")
    shape = dict(B=1, T=9, d=24, h=40, heads=2)
    sample = former_block.make(shape, torch.Generator().manual_seed(0))
    given = {k: None if v is None else v.float() for k, v in sample.tensors.items()}
    others = dict(num_heads=4, form="released", eps=1e-5) | sample.others
    truth = former_block.REFERENCE(**given, **others)
    for index, at in enumerate(barriers):
        (tmp_path / "csrc" / "cuda" / "former_block.cuh").write_text(text[:at] + text[at + 16 :])
        target, folder = tmp_path / f"{index}.so", tmp_path / "tests" / "cuda"
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DMFK_EMULATED", f"-I{folder}"]
        subprocess.run([*CXX, *flags, "-o", target, folder / "former_block.cpp"], check=True)
        library = ctypes.CDLL(target)
        results = [run_former(library, given, **others, backwards=order) for order in (0, 1)]
        assert not all(torch.allclose(result, truth, atol=1e-4) for result in results), f"barrier {index}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_former_block_on_a_gpu(dtype, layout):
    if reason := mfkernels.backends.unavailable("cuda"):
        pytest.skip(reason)
    for shape in former_block.CHOSEN:
        comparison = Comparison(former_block, dtype, "cuda", "cuda")
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            sample = former_block.make(shape, generator)
            comparison.add(expect(former_block, sample, generator, dtype), layout)
        comparison.check(f"{shape}")


@pytest.mark.skipif(NVCC is None, reason="no nvcc was found")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path, record_property):
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        "-cubin",
        "-Xptxas=-v",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command = [NVCC, *flags, f"-I{include}", "-o", tmp_path / "out.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    record_property("registers", registers)
    assert registers and max(registers) <= 128, done.stderr
    assert spills and not any(spills), done.stderr

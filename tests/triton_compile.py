"""Compiles every Triton kernel for GPUs that need not be there:

    python triton_compile.py [--all] [OPERATOR ...]

for the first shape of an operator's cases in every dtype, with --all for all of them (half an hour).

Runs the launchers on CPU tensors with the launch replaced by a note of its arguments; then compiles each
kernel for each kind of arguments and each target. Prints a line of JSON for each: registers a thread and
spills.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from cases import modules
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import mfkernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launches(op, every_shape: bool) -> dict[str, tuple[str, str, dict, dict, dict]]:
    """The kinds of launches of an operator: module, kernel, signature, constants and options, by a name."""
    importlib.import_module(f"mfkernels.operators.{op.NAME}.triton")  # before anything is interpreted
    found = {}

    def note(kernel: JITFunction, *args, grid, warmup, **kwargs):
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
        signature = {
            name: "constexpr" if name in constants else _type(given[name]) for name in kernel.arg_names
        }
        options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
        values = {k: str(v) for k, v in (constants | options).items()}
        name = json.dumps([kernel.__module__, kernel.__name__, signature, values])
        found[name] = (kernel.__module__, kernel.__name__, signature, constants, options)

    original = JITFunction.run
    JITFunction.run = note
    try:
        for dtype in DTYPES:
            for shape in op.CHOSEN if every_shape else op.CHOSEN[:1]:
                sample = op.make(shape, torch.Generator().manual_seed(0)).map(
                    lambda v, dtype=dtype: v.to(dtype).requires_grad_()
                )
                os.environ["TRITON_INTERPRET"] = "1"  # only so that CPU tensors are let through
                with mfkernels.use_backend("triton"):
                    outputs = sample.call(op.OP)
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    torch.autograd.grad(outputs, list(sample.given().values()), [o.detach() for o in outputs])
                del os.environ["TRITON_INTERPRET"]
    finally:
        JITFunction.run = original
    return found


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + (DTYPES | {torch.float64: "fp64"})[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def build(module: str, kernel: str, signature: dict, constants: dict, options: dict, target: str) -> dict:
    function = getattr(importlib.import_module(module), kernel)
    source = ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()})
    with mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):  # `_ptxas` does that, and says more
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    types = sorted({t for t in signature.values() if t.startswith("*")})
    result = {"operator": module.split(".")[2], "kernel": kernel, "target": target, "types": types}
    result["constants"] = {k: str(v) for k, v in (constants | options).items()}
    if target.startswith("sm"):
        return result | _ptxas(compiled.asm["ptx"], target)
    text = compiled.asm["amdgcn"]
    # Scalar registers spill into vector registers, not into memory.
    spills = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", text))
    return result | {"registers": int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]), "spills": spills}


def _ptxas(ptx: str, target: str) -> dict:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    ptxas = blackwell if target == "sm_100" and blackwell.exists() else folder / "ptxas"
    chip = re.findall(r"\.target\s+(sm_\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={chip}", str(file), "-o", str(file) + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    return {"registers": int(re.findall(r"Used (\d+) registers", said)[0]), "spills": spills}


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--all"]
    kinds = {}
    for op in modules():
        if not names or op.NAME in names:
            kinds |= launches(op, "--all" in sys.argv)
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(build, *kind, target) for kind in kinds.values() for target in TARGETS]
        for job in jobs:
            print(json.dumps(job.result()), flush=True)


if __name__ == "__main__":
    main()

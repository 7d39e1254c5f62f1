"""Compiles every Triton kernel for GPUs that need not be there:

    python triton_compile.py [--all] [OPERATOR ...]

for every layer of the released networks in float32 and bfloat16, and for the first of an operator's chosen
shapes in float16, whose tiles and registers are those of bfloat16; with --all instead for all chosen shapes
in every dtype (half an hour).

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton
from cases import modules
from family_layers import is_tensor, layers
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import mfkernels
from mfkernels.deploy.activated_depthwise_triton import activated_depthwise

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Kind = tuple[str, str, dict, dict, dict]  # of launches: module, kernel, signature, constants and options


@contextmanager
def noted() -> Iterator[dict[str, Kind]]:
    """The kinds of the launches in the `with` block, none of which is made, by a name."""
    found: dict[str, Kind] = {}

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

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # only so that CPU tensors are let through
        mfkernels.use_backend("triton"),
    ):
        yield found


def launch_shapes(op: ModuleType, dtype: torch.dtype, shapes: list[dict]) -> None:
    """Forward and backward."""
    for shape in shapes:
        sample = op.make(shape, torch.Generator().manual_seed(0)).map(lambda v: v.to(dtype).requires_grad_())
        _differentiate(sample.call(op.OP), sample.given().values())


def launch_layers(op: ModuleType, dtype: torch.dtype) -> None:
    """Forward and backward."""
    run = getattr(torch.ops.mfkernels, op.NAME)
    for layer in layers()[op.NAME]:
        arguments = [
            torch.empty(value[1:], dtype=dtype, requires_grad=True) if is_tensor(value) else value
            for value in layer
        ]
        _differentiate(run(*arguments), (a for a in arguments if isinstance(a, torch.Tensor)))


def _differentiate(outputs: torch.Tensor | Sequence[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    outputs = [out for out in outputs if out.requires_grad]
    torch.autograd.grad(outputs, list(inputs), [out.detach() for out in outputs], allow_unused=True)


def launch_activated_depthwise(dtype: torch.dtype) -> None:
    """Of deployed networks; both memory formats, with and without an activation before."""
    weight, bias, slopes = torch.empty(16, 1, 3, 3), torch.empty(16), torch.empty(1, 2, 16)
    for x in (torch.empty(1, 16, 9, 9), torch.empty(1, 9, 9, 16).permute(0, 3, 1, 2)):
        for before in (None, slopes):
            given = (x, before, weight, bias, slopes)
            activated_depthwise(*(None if t is None else t.to(dtype) for t in given))


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
    result = {
        "operator": module.split(".")[2].removesuffix("_triton"),
        "kernel": kernel,
        "target": target,
        "types": types,
    }
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
    operators = [op for op in modules() if not names or op.NAME in names]
    for op in operators:  # before anything is interpreted
        importlib.import_module(f"mfkernels.operators.{op.NAME}.triton")
    with noted() as kinds:
        for dtype in DTYPES:
            for op in operators:
                if "--all" in sys.argv:
                    launch_shapes(op, dtype, op.CHOSEN)
                elif dtype == torch.float16:
                    launch_shapes(op, dtype, op.CHOSEN[:1])
                else:
                    launch_layers(op, dtype)
            if not names or "activated_depthwise" in names:
                launch_activated_depthwise(dtype)
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(build, *kind, target) for kind in kinds.values() for target in TARGETS]
        for job in jobs:
            print(json.dumps(job.result()), flush=True)


if __name__ == "__main__":
    main()

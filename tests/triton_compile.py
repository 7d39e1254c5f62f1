"""Compiles every Triton kernel for GPUs that need not be there:

    python triton_compile.py [--all] [OPERATOR ...]

for every layer of the released networks in float32 and bfloat16, and for the first of an operator's chosen
shapes in float16, whose tiles and registers are those of bfloat16; with --all instead for all chosen shapes
in every dtype (half an hour).

Runs the launchers on CPU tensors and has Triton say what it would compile: numbers that are 1 are constants,
and those that 16 divides make variants. Then compiles each variant for each target. Prints a line of JSON for
each: registers a thread and spills.
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
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import mfkernels
from mfkernels.deploy.activated_depthwise_triton import activated_depthwise

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # along the axes of a grid


class Driver:
    """In the place of Triton's: of a GPU that is not there."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def noted(targets: Iterable[str]) -> Iterator[dict[str, str]]:
    """What Triton would compile for the launches in the `with` block, none of which is made: its own words,
    with the target's name."""
    found: dict[str, str] = {}
    run = JITFunction.run

    def note(kernel: JITFunction, *args, grid, warmup, **kwargs):
        assert all(n <= most for n, most in zip(grid, MOST_PROGRAMS, strict=False)), (kernel, grid)
        for target in targets:
            driver.set_active(Driver(target))
            run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def keep(*, compile, **_) -> bool:
        found[compile["specialization_data"]] = compile["device"]
        return True  # it need not be compiled

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", keep),
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


def build(kind: str, target: str) -> dict:
    said = json.loads(kind)
    module, _, kernel = said["name"].rpartition(".")
    driver.set_active(Driver(target))
    with mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):  # `_ptxas` does that, and says more
        compiled = getattr(importlib.import_module(module), kernel).preload(kind)
    names = list(said["signature"])
    result = {
        "operator": module.split(".")[2].removesuffix("_triton"),
        "kernel": kernel,
        "target": target,
        "types": sorted({t for t in said["signature"].values() if t.startswith("*")}),
        "constants": {
            names[at]: value
            for (at,), value in zip(said["constant_keys"], said["constant_vals"], strict=True)
        },
        "warps": said["options"]["num_warps"],
    }
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
    with noted(TARGETS) as kinds:
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
        jobs = [pool.submit(build, *kind) for kind in kinds.items()]
        for job in jobs:
            print(json.dumps(job.result()), flush=True)


if __name__ == "__main__":
    main()

"""Write an account of networks on an H100, kernel by kernel, computed from compiled code.

    python benchmarks/gpu_account.py > docs/gpu.md

Nothing is run on a GPU and none is needed: launches are noted on tensors without memory, and Triton compiles
their kernels for sm_90.
"""

import copy
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import triton_compile
from cases import modules

import mfkernels
from mfkernels.checks import tensors_in
from mfkernels.deploy.folding import fold_batch_norms
from mfkernels.deploy.gpu import by_kernel, fused_block
from mfkernels.deploy.gpu.fused_block import forms
from mfkernels.models import create_model
from mfkernels.operators.dispatch import _functions
from mfkernels.operators.triton_maps import splits_of

NETWORKS = ("mobile_former_214m", "dmf_s", "iformer_m")
BATCHES = (1, 64)
# Of an H100 SXM, by its data sheet: bytes and operations (bfloat16, on tensor cores) a second.
BANDWIDTH, OPERATIONS = 3.35e12, 989e12
PROCESSORS, WARPS, REGISTERS, SHARED, BLOCKS = 132, 64, 65536, 227 << 10, 32
INTRODUCTION = f"""# What the networks should take on an H100

**Every figure here is computed, and none was measured: nothing on this page ran on a GPU.** They follow from
the launches that a network makes, the tensors that these read and write, and the machine code that Triton
{triton.__version__} makes of our kernels for sm_90. `python benchmarks/gpu_account.py > docs/gpu.md` computes
them again, without a GPU; `benchmarks/gpu.sh` measures, with one.

The networks have their batch norms folded, in bfloat16, at 224x224, channels first. Of the forms that
`deploy` tries without CUDA C++ kernels the first is the network as it is; kernel by kernel there is the last
one, which makes the fewest launches. Forms with CUDA C++ kernels are not in it.

- *launches*: nodes of the CUDA graph. PyTorch's operators count as one each; a library may use more.
- *MB*: each tensor that a launch is given or makes, once. A kernel that reads its input twice moves more.
- *bound, us*: the longer of these bytes at {BANDWIDTH / 1e12} TB/s and of the operations at
  {OPERATIONS / 1e12:.0f} TFLOPS, the data sheet's. It leaves out what a launch costs and how long a
  kernel waits for its own results, which at batch 1 is most of the time: a bound is no estimate of it.
- *programs*: thread blocks of all launches together.
- *instructions*: in the machine code of a variant, from the fewest to the most. Loops are counted once.
- *a processor*: of {PROCESSORS}, how many warps of the {WARPS} that it can hold fit, by registers, shared
  memory and blocks (the fewest of the variants).
"""


@dataclass
class Row:
    """Of all launches of a kernel, or of an operator of PyTorch."""

    launches: int = 0
    bytes: int = 0
    seconds: float = 0.0
    programs: int = 0
    variants: set[str] = field(default_factory=set)


class Account(TorchDispatchMode):
    """Notes what a network launches; our operators' functions for GPUs are called from here."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Row] = {}
        self._ours = {name: f for op in modules() for name, f in _functions(op.NAME)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if function.namespace == "mfkernels":
            with self:
                return self._ours[name](*args, **kwargs or {})
        out = function(*args, **kwargs or {})
        if triton_compile.launched(function, args, out):
            tensors = [t for a in args for t in tensors_in(a)] + tensors_in(out)
            count = flop_registry.get(function._overloadpacket)
            self.add(name, tensors, count(*args, **kwargs or {}, out_val=out) if count else 0)
        return out

    def add(self, name: str, tensors: list[torch.Tensor], operations: int = 0) -> Row:
        row = self.rows.setdefault(name, Row())
        moved = sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
        row.launches += 1
        row.bytes += moved
        row.seconds += max(moved / BANDWIDTH, operations / OPERATIONS)
        return row

    def noting(self) -> Any:
        """`note` as a method of kernels."""
        return lambda kernel, *args, **others: self.note(kernel, *args, **others)

    def note(self, kernel: JITFunction, *args: Any, grid: tuple, warmup: bool, **others: Any) -> None:
        """In the place of a launch."""
        operator = triton_compile.operator_of(kernel.fn.__module__)
        row = self.add(f"{operator}: {kernel.fn.__name__}", [a for a in args if isinstance(a, torch.Tensor)])
        row.programs += grid[0]

        def keep(*, compile: dict, **_: Any) -> bool:
            row.variants.add(compile["specialization_data"])
            return True  # it is compiled later

        with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", keep):
            RUN(kernel, *args, grid=grid, warmup=warmup, **others)


RUN, SPLITS_OF = JITFunction.run, splits_of


def splits_on_an_h100(pixels: int, batches: int, device: torch.device, block: int) -> tuple[int, int]:
    """Return what `splits_of` says there."""
    properties = mock.Mock(multi_processor_count=PROCESSORS)
    with mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties):
        return SPLITS_OF(pixels, batches, torch.device("cuda"), block)


def accounts_of(name: str, batch: int) -> list[dict[str, Row]]:
    """Return the launches for this number of images of each form of the network, the first as it is."""
    with torch.device("meta"):
        model = create_model(name).eval().requires_grad_(False)
    model = copy.deepcopy(model)
    model = model.fuse() if name.startswith("iformer") else fold_batch_norms(model)
    x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    driver.set_active(triton_compile.Driver(triton_compile.TARGETS["sm_90"]))
    with mock.patch.object(fused_block, "CUDA_LACKS", "they are not asked for"):
        networks = [form.to(torch.bfloat16) for form in forms(model, torch.bfloat16)]
    found = []
    for network in networks:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(by_kernel, "has_kernels", lambda x: True))
            for op in modules():
                module = importlib.import_module(f"mfkernels.operators.{op.NAME}.triton")
                if hasattr(module, "splits_of"):
                    stack.enter_context(mock.patch.object(module, "splits_of", splits_on_an_h100))
            account = stack.enter_context(Account())
            stack.enter_context(mock.patch.object(JITFunction, "run", account.noting()))
            stack.enter_context(mfkernels.use_backend("cpu"))
            stack.enter_context(torch.no_grad())
            network(x)
        found.append(account.rows)
    return found


def compiled(said: str) -> tuple[int, int]:
    """Instructions of a variant, and how many warps a multiprocessor holds of it."""
    made = triton_compile.compiled(triton_compile.TARGETS["sm_90"], said)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        command = [tools / "cuobjdump", "-sass", "-res-usage", file]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z]\w*)", said, re.M)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", said))
    warps, shared = made.metadata.num_warps, made.metadata.shared + 1024  # of the system, a block
    by_registers = REGISTERS // (-(-32 * registers // 256) * 256) // warps
    return len([line for line in lines if line != "NOP"]), warps * min(
        by_registers, SHARED // shared, WARPS // warps, BLOCKS
    )


def between(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def table(rows: dict[str, Row], known: dict[str, tuple[int, int]]) -> list[str]:
    lines = ["| kernel | launches | MB | bound, us | programs | instructions | a processor |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in sorted(rows.items(), key=lambda pair: -pair[1].seconds):
        code = [known[said] for said in row.variants]
        ours = ("", "", "")
        if code:
            ours = str(row.programs), between([n for n, _ in code]), f"{min(n for _, n in code)} warps"
        figures = str(row.launches), f"{row.bytes / 1e6:.2f}", f"{row.seconds * 1e6:.1f}"
        lines.append("| " + " | ".join((name, *figures, *ours)) + " |")
    total = Counter(launches=0)
    for row in rows.values():
        total.update(launches=row.launches, bytes=row.bytes)
    seconds = sum(row.seconds for row in rows.values())
    figures = str(total["launches"]), f"{total['bytes'] / 1e6:.2f}", f"{seconds * 1e6:.1f}"
    lines.append("| " + " | ".join(("**together**", *figures, "", "", "")) + " |")
    return lines


def summary(all_forms: dict[tuple[str, int], list[dict[str, Row]]]) -> list[str]:
    """Return a table of all forms' launches, MB and bounds."""
    lines = ["| network | batch | form | launches | MB | bound, us |", "|---|---:|---:|---:|---:|---:|"]
    for (name, batch), found in all_forms.items():
        for i, rows in enumerate(found):
            launches, moved = (sum(getattr(r, what) for r in rows.values()) for what in ("launches", "bytes"))
            seconds = sum(row.seconds for row in rows.values())
            figures = f"{launches} | {moved / 1e6:.2f} | {seconds * 1e6:.1f}"
            lines.append(f"| {name} | {batch} | {i + 1} | {figures} |")
    return lines


def main() -> None:
    triton_compile.load_kernels()
    all_forms = {(name, batch): accounts_of(name, batch) for name in NETWORKS for batch in BATCHES}
    accounts = {key: found[-1] for key, found in all_forms.items()}
    variants = sorted({said for rows in accounts.values() for row in rows.values() for said in row.variants})
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        known = dict(zip(variants, pool.map(compiled, variants), strict=True))
    print(INTRODUCTION)
    print("\n".join(summary(all_forms)) + "\n")
    for (name, batch), rows in accounts.items():
        print(f"## {name}, batch {batch}: computed, not measured\n")
        print("\n".join(table(rows, known)) + "\n")


if __name__ == "__main__":
    main()

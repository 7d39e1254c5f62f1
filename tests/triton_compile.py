"""Compiles every Triton kernel for GPUs that need not be there:

    python triton_compile.py [--all | --rest] [OPERATOR ...]

for every layer of the released networks: in bfloat16 each variant for sm_90, and one of each tile for gfx942;
in float32 one of each tile for sm_80; and in float16, whose tiles and registers are those of bfloat16, the
first of an operator's chosen shapes for sm_100. In the first two also the chosen shapes of padded batches.
With --rest instead each kernel's largest tile for every target and dtype that is not among these; with --all
for all chosen shapes in every dtype and for every target (an hour).

Runs the launchers on CPU tensors and has Triton say what it would compile: numbers that are 1 are constants,
and those that 16 divides make variants. Prints a line of JSON for each: registers a thread, spilled bytes and
others of local memory, and bytes of shared memory.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
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
from mfkernels.deploy.gpu.activated_conv_triton import dynamic_conv, response_factors, response_gelu
from mfkernels.deploy.gpu.activated_depthwise_triton import activated_depthwise
from mfkernels.deploy.gpu.former_to_mobile_triton import former_to_mobile
from mfkernels.deploy.gpu.kernel_scores_triton import kernel_scores
from mfkernels.deploy.gpu.pointwise_triton import pointwise
from mfkernels.deploy.gpu.token_steps_triton import outputs_of_tokens, update_tokens

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
EACH = TARGETS["sm_90"]  # for which each variant is compiled, for the others one of each tile
PARTS = {torch.float32: ["sm_80"], torch.bfloat16: ["sm_90", "gfx942"], torch.float16: ["sm_100"]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Variant = tuple[GPUTarget, str]  # and what Triton says of it: kernel, types, constants, options
# Bytes of a thread's stack, and of these what spills. ptxas takes eight where doubles are divided, though
# nothing spills. Of the rest, which networks in bfloat16 on sm_90 do not launch, the largest tiles in float32
# spill a few registers with Triton 3.7; with older ones those of the networks in float32 do, too.
MOST_LOCAL, MOST_LOCAL_OF_THE_REST, MOST_SPILLED_OF_THE_REST = 8, 36, 12
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes
MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # along the axes of a grid


class Driver:
    """In the place of Triton's: of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def noted(*targets: GPUTarget) -> Iterator[dict[Variant, None]]:
    """What Triton would compile for these targets for the launches in the `with` block, none of which is
    made."""
    found: dict[Variant, None] = {}
    run = JITFunction.run

    def note(kernel: JITFunction, *args, grid, warmup, **kwargs):
        assert all(n <= most for n, most in zip(grid, MOST_PROGRAMS, strict=False)), (kernel, grid)
        for target in targets:
            driver.set_active(Driver(target))
            with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", partial(keep, target)):
                run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def keep(target: GPUTarget, *, compile: dict, **_) -> bool:
        found[target, compile["specialization_data"]] = None
        return True  # Triton need not compile it

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(driver, "_active", None),  # until here
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # only so that CPU tensors are let through
        mfkernels.use_backend("triton"),
    ):
        yield found


def compiled(target: GPUTarget, said: str) -> Any:
    """The kernel that Triton makes of a variant, which stays in its cache."""
    module, _, name = json.loads(said)["name"].rpartition(".")
    driver.set_active(Driver(target))
    return getattr(importlib.import_module(module), name).preload(said)


def in_cache(target: GPUTarget, said: str) -> None:
    """Has a variant in Triton's cache, for other processes."""
    compiled(target, said)


def constants_of(said: str) -> dict[str, Any]:
    """By name; numbers that happen to be 1 are among them."""
    variant = json.loads(said)
    names = list(variant["signature"])
    places = (names[at] for (at,) in variant["constant_keys"])
    return dict(zip(places, variant["constant_vals"], strict=True))


def one_of_each_tile(variants: Iterable[Variant]) -> list[Variant]:
    """Those that differ in more than in which numbers are 1 and which ones 16 divides."""
    found = {}
    for target, said in variants:
        variant = json.loads(said)
        constants = {k: v for k, v in constants_of(said).items() if k.isupper() or v is None}
        types = [t for t in variant["signature"].values() if t.startswith("*")]
        key = (target, variant["name"], str(constants), str(types), variant["options"]["num_warps"])
        found.setdefault(key, (target, said))
    return list(found.values())


def launch_shapes(op: ModuleType, dtype: torch.dtype, shapes: list[dict]) -> None:
    """Forward and backward."""
    for shape in shapes:
        sample = op.make(shape, torch.Generator().manual_seed(0)).map(lambda v: v.to(dtype).requires_grad_())
        _differentiate(sample.call(op.OP), sample.given().values())


def padded_shapes(op: ModuleType) -> list[dict]:
    """Chosen shapes of padded batches, which no layer of `family_layers` is called with."""
    return [shape for shape in op.CHOSEN if shape.get("mask") == "padding"]


def launch_layers(
    op: ModuleType,
    dtype: torch.dtype,
    networks: tuple[str, ...] | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    """Forward and backward, of these networks or of all."""
    run = getattr(torch.ops.mfkernels, op.NAME)
    for layer in layers(networks=networks).get(op.NAME, ()):
        arguments = [_empty(value[1:], dtype, layout) if is_tensor(value) else value for value in layer]
        _differentiate(run(*arguments), (a for a in arguments if isinstance(a, torch.Tensor)))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    layout = layout if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout, requires_grad=True)


def _differentiate(outputs: torch.Tensor | Sequence[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    outputs = [out for out in outputs if out.requires_grad]
    torch.autograd.grad(outputs, list(inputs), [out.detach() for out in outputs], allow_unused=True)


def launch_tests(op: ModuleType, dtype: torch.dtype) -> None:
    """What `test_triton.py` launches on a GPU."""
    from test_contract import LAYOUTS, cotangents_of, run  # needs pytest, which a benchmark may lack

    for shape in op.CHOSEN:
        generator = torch.Generator().manual_seed(0)
        sample = op.make(shape, generator)
        cotangents = {k: v.to(dtype) for k, v in cotangents_of(op, sample, generator).items()}
        for layout in LAYOUTS:
            run(op, sample.map(lambda v: v.to(dtype)), op.OP, cotangents, layout)


def launch_activated_depthwise(dtype: torch.dtype) -> None:
    """In both memory formats, with and without an activation before."""
    weight, bias, slopes = torch.empty(16, 1, 3, 3), torch.empty(16), torch.empty(1, 2, 16)
    for x in (torch.empty(1, 16, 9, 9), torch.empty(1, 9, 9, 16).permute(0, 3, 1, 2)):
        for before in (None, slopes):
            given = (x, before, weight, bias, slopes)
            activated_depthwise(*(None if t is None else t.to(dtype) for t in given))


def launch_kernel_scores(dtype: torch.dtype) -> None:
    """As of the first and the last dynamic convolution of dmf_s; and with a softmax, of the most parts."""
    for channels, parts, softmax in ((24, 1, False), (1440, 1, False), (144, 49, True)):
        sums = torch.empty(2, parts, channels, dtype=dtype if parts == 1 else torch.float32)
        shapes = (2, 192), (192, 192 + channels), (192,), (8, 192)
        kernel_scores(sums, 9, *(torch.empty(shape, dtype=dtype) for shape in shapes), softmax)


def launch_activated_conv(dtype: torch.dtype) -> None:
    """In both memory formats: each tile of dmf_s's dynamic convolutions, and a norm of responses."""
    for channels, outputs, size, groups in ((240, 40, 1, 4), (240, 768, 1, 4), (144, 144, 3, 144)):
        kernel = outputs, channels // groups, size, size
        given = [torch.empty(of, dtype=dtype) for of in (kernel, (8, *kernel), (2, 8), (outputs,))]
        for pixels in (4, 14):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.empty(2, channels, pixels, pixels, dtype=dtype, memory_format=layout)
                for gelu in (False, True):
                    dynamic_conv(x, *given, 1, size // 2, groups, 0.1, gelu, 2 - gelu)
                response_gelu(x, *torch.empty(2, channels, dtype=dtype), "released", 1e-6)
    for mean in ("released", "channels"):
        response_factors(torch.empty(2, 25, 648), torch.empty(648, dtype=dtype), mean, 1e-6)


def launch_token_steps(dtype: torch.dtype) -> None:
    """As of mobile_former_26m, without a following block, and of mobile_former_508m; and the last bridges."""
    for width, channels, outputs, units, hidden, following in (
        (128, 24, 48, 32, 0, 0),
        (192, 240, 240, 48, 384, 4),
    ):
        vectors, square = [(width,)] * 2, [(width, width), (width,)]
        layers = [(width, channels), (width,), *vectors, *square, *square, *vectors]
        layers += [(hidden, width), (hidden,), (width, hidden), *vectors, (width,)] if hidden else []
        networks = [(units, width), (units,), (6 * outputs, units), (6 * outputs,)] * 2
        heads = [(outputs, width), (outputs,)] * (4 if following else 2)
        given, tokens = (torch.empty(2, 6, n, dtype=dtype) for n in (channels, width))
        first, *rest = (
            [torch.empty(of, dtype=dtype) for of in shapes] for shapes in (layers, networks, heads)
        )
        update_tokens(given, given if following else None, tokens, first, 4, 1e-5)
        update_tokens(given, given, tokens, first[:4], 1, 1e-5)
        outputs_of_tokens(tokens, 0, *rest)


def launch_former_to_mobile(dtype: torch.dtype) -> None:
    """In both memory formats."""
    tokens = torch.empty(2, 2, 6, 128, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(2, 128, 14, 14, dtype=dtype, memory_format=layout)
        former_to_mobile(x, x, *tokens, 2)


def launch_pointwise(dtype: torch.dtype) -> None:
    """In both memory formats: each tile, with what comes after it."""
    for channels, outputs, pixels in ((48, 192, 28), (768, 192, 14), (96, 24, 4)):
        weight, bias = torch.empty(outputs, channels, 1, 1, dtype=dtype), torch.empty(outputs, dtype=dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            x, y = (
                torch.empty(2, n, pixels, pixels, dtype=dtype, memory_format=layout)
                for n in (channels, outputs)
            )
            norm = torch.empty(2, channels), torch.empty(channels, dtype=dtype)
            for residual, gelu, response in ((None, True, ()), (y, False, ()), (y, False, norm)):
                pointwise(x, weight, bias, residual, gelu, *response)


# Of deployed networks.
DEPLOYED = dict(
    activated_depthwise=launch_activated_depthwise,
    activated_conv=launch_activated_conv,
    former_to_mobile=launch_former_to_mobile,
    kernel_scores=launch_kernel_scores,
    pointwise=launch_pointwise,
    token_steps=launch_token_steps,
)


def launch_deployed(names: Sequence[str], dtype: torch.dtype) -> None:
    for name, launch in DEPLOYED.items():
        if name in names:
            launch(dtype)


def launched(function: Any, args: tuple, out: Any) -> bool:
    """Whether an operator of PyTorch launched something; `contiguous` and `reshape` do where they copy."""
    name = function._schema.name.split("::")[1]
    if name in ("contiguous", "reshape"):
        return out.untyped_storage()._cdata != args[0].untyped_storage()._cdata
    return not (function.is_view or "empty" in name or name in ("_unsafe_view", "_reshape_alias", "detach"))


def build(target: str, said: str) -> dict:
    with mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""):  # `_ptxas` does that, and says more
        made = compiled(TARGETS[target], said)
    variant = json.loads(said)
    module, _, kernel = variant["name"].rpartition(".")
    result = {
        "operator": operator_of(module),
        "kernel": kernel,
        "target": target,
        "types": sorted({t for t in variant["signature"].values() if t.startswith("*")}),
        "constants": constants_of(said) | {"num_warps": variant["options"]["num_warps"]},
        "shared": made.metadata.shared,
    }
    if target.startswith("sm"):
        return result | _ptxas(made.asm["ptx"], target)
    text = made.asm["amdgcn"]
    # Scalar registers spill into vector registers, not into memory.
    spills = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", text))
    local = sum(int(n) for n in re.findall(r"private_segment_fixed_size:\s*(\d+)", text))
    registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
    return result | {"registers": registers, "spills": spills, "local": local}


def fits(result: dict, spilled: int = 0, local: int = MOST_LOCAL) -> bool:
    """Whether a block can run there, with all that it keeps on the chip but for so many bytes."""
    if (
        result["spills"] > spilled
        or result["local"] > local
        or result["shared"] > MOST_SHARED[result["target"]]
    ):
        return False
    warps = result["constants"]["num_warps"]
    if result["target"].startswith("sm"):  # registers are given out to warps by 256
        return warps * -(-32 * result["registers"] // 256) * 256 <= 65536
    return -(-warps // 4) * result["registers"] <= 512  # of a thread on each of four units


def operator_of(module: str) -> str:
    """`mfkernels.operators.<op>.triton`, or `mfkernels.deploy.gpu.<op>_triton`."""
    *_, folder, file = module.split(".")
    return folder if file == "triton" else file.removesuffix("_triton")


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
    local = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", said))
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    return {"registers": registers, "spills": spills, "local": local}


def variants_of_networks(names: Sequence[str]) -> list[Variant]:
    """Of the operators of these names."""
    found: list[Variant] = []
    for dtype, targets in PARTS.items():
        with noted(*(TARGETS[name] for name in targets)) as new:
            for op in modules():
                if op.NAME in names and dtype == torch.float16:
                    launch_shapes(op, dtype, op.CHOSEN[:1])
                elif op.NAME in names:
                    launch_layers(op, dtype)
                    launch_shapes(op, dtype, padded_shapes(op))
            launch_deployed(names, dtype)
        found += [variant for variant in new if variant[0] == EACH]
        found += one_of_each_tile(variant for variant in new if variant[0] != EACH)
    return found


def variants_of_the_rest(names: Sequence[str]) -> list[Variant]:
    """What `variants_of_networks` leaves out: of each kernel the largest tile."""
    largest: dict[Any, tuple[int, Variant]] = {}
    for dtype, targets in PARTS.items():
        with noted(*(target for name, target in TARGETS.items() if name not in targets)) as found:
            for op in modules():
                if op.NAME in names:
                    launch_layers(op, dtype)
        for target, said in found:
            tile = [n for k, n in constants_of(said).items() if k.isupper() and isinstance(n, int)]
            key = (target, dtype, json.loads(said)["name"])
            new = (math.prod(tile), (target, said))
            largest[key] = max(largest.get(key, new), new, key=lambda pair: pair[0])
    return [variant for _, variant in largest.values()]


def all_variants(names: Sequence[str]) -> list[Variant]:
    with noted(*TARGETS.values()) as found:
        for dtype in DTYPES:
            for op in modules():
                if op.NAME in names:
                    launch_shapes(op, dtype, op.CHOSEN)
            launch_deployed(names, dtype)
    return list(found)


def to_be_launched(target: GPUTarget, networks: tuple[str, ...], quick: bool) -> list[Variant]:
    """By these networks' layers, in both memory formats, and then by the tests; a glance: by one shape."""
    load_kernels()
    with noted(target) as of_networks:
        for dtype in DTYPES if not quick else ():
            launch_deployed(list(DEPLOYED), dtype)
            for op in modules():
                for layout in (torch.contiguous_format, torch.channels_last):
                    launch_layers(op, dtype, networks, layout)
    with noted(target) as of_tests:
        for dtype in DTYPES if not quick else ():
            for op in modules():
                launch_tests(op, dtype)
        if quick:
            op = next(op for op in modules() if op.NAME == "dynamic_relu")
            launch_shapes(op, torch.float32, op.CHOSEN[:1])
    return list(of_networks | of_tests)


def load_kernels() -> None:
    """Before anything is interpreted."""
    for op in modules():
        importlib.import_module(f"mfkernels.operators.{op.NAME}.triton")


def main() -> None:
    load_kernels()
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    names = names or [*DEPLOYED, *(op.NAME for op in modules())]
    choose = {"--all": all_variants, "--rest": variants_of_the_rest}
    variants = choose.get(sys.argv[1] if len(sys.argv) > 1 else "", variants_of_networks)(names)
    name_of = {target: name for name, target in TARGETS.items()}
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(build, name_of[target], said) for target, said in variants]
        results = [job.result() for job in jobs]
    for result in results:
        print(json.dumps(result), flush=True)
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    rest = MOST_SPILLED_OF_THE_REST, MOST_LOCAL_OF_THE_REST

    def allowed(result: dict) -> tuple[int, ...]:
        return rest if "--rest" in sys.argv or (older and result["target"] != "sm_90") else ()

    misfits = [result for result in results if not fits(result, *allowed(result))]
    if misfits:
        sys.exit("these do not fit: " + json.dumps(misfits))


if __name__ == "__main__":
    main()

"""Counts the instructions that a call of a network executes on 64-bit Arm, in ours and in other runtimes.

    make arm-counts [COUNTED="NETWORK ..."]

Each program runs under QEMU's emulation of a Neoverse N1, on one thread, float32, batch 1, 224x224; the count
is that of its third call, and exact. It is no time: instructions take different numbers of cycles, and a
cache that misses is not seen. Each runtime has the form of the network that needs the fewest, of those whose
numbers agree with PyTorch's. Prints a table, and appends its rows to the results.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mfkernels
from mfkernels.bench.figures import RESULTS
from mfkernels.bench.run import LIMITS, formulations, machine, network
from mfkernels.bench.runtimes import ONNX, Job, write_litert, write_ncnn

ROOT = Path(__file__).parents[2]
ARM = ROOT / "build" / "arm"
PROCESSOR, SIDE, CLASSES, CALLS = "neoverse-n1", 224, 1000, 3
RUNTIMES = ("litert", "ncnn", "onnxruntime")
# What Linux says of such a processor: runtimes read it, and would find this machine's.
FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
)
CPUINFO = f"""processor\t: 0
Features\t: {FEATURES} ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


def describe_processor() -> None:
    """Write the files of Linux that tell of one such processor to where the emulator looks first."""
    folder = ARM / "root" / "sys" / "devices" / "system" / "cpu"
    for name in ("possible", "present", "online"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("0\n")
    (ARM / "root" / "proc").mkdir(exist_ok=True)
    (ARM / "root" / "proc" / "cpuinfo").write_text(CPUINFO)


def emulated(folder: Path, *command: object) -> int:
    """Run a program in emulation and return the instructions between its last two calls of getppid."""
    counts = folder / "counts"
    settings = {"QEMU_CPU": PROCESSOR, "QEMU_LD_PREFIX": str(ARM / "root"), "OMP_NUM_THREADS": "1"}
    emulator = ["qemu-aarch64", "-plugin", f"{ARM / 'plugin.so'},out={counts}"]
    environment = os.environ | settings | {"PYTHONPATH": str(ARM / "rivals"), "PYTHONHASHSEED": "0"}
    subprocess.run(
        [*emulator, *map(str, command)], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=1800
    )
    *_, before, after = map(int, counts.read_text().split())
    return after - before


def ours(folder: Path, model: Any, x: Tensor) -> tuple[int, np.ndarray]:
    """Return the instructions of the deployed network, without PyTorch around it, and its result."""
    deployed: Any = mfkernels.deploy(model)
    path = folder / "ours"
    deployed.plan[3:].numpy().tofile(f"{path}.plan")
    deployed.weights.numpy().tofile(f"{path}.weights")
    x.numpy().tofile(f"{path}.image")
    count = emulated(folder, ARM / "networks" / "networks", "--calls", CALLS, SIDE, CLASSES, path)
    return count, np.fromfile(f"{path}.out", np.float32)[None]


def written(runtime: str, job: Job, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the forms of a network in a runtime, and what writes each to `path`."""
    for name, model in job.formulations.items():
        if runtime == "litert":
            yield name, lambda model=model: write_litert(model, job.x, path)
        elif runtime == "ncnn":
            yield name, lambda model=model: write_ncnn(model, job.x, path)
        else:
            for how, newer in ONNX.items():
                yield (
                    f"{name}, {how}",
                    lambda name=name, newer=newer: path.write_bytes(job.onnx(name, newer)),
                )


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Count a network in all runtimes."""
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = network(name)
        with mfkernels.use_backend("reference"):
            expected = model(x).numpy()
        np.save(folder / "image.npy", x.numpy())

        def agrees(result: np.ndarray) -> bool:
            return bool(abs(result - expected).max() <= LIMITS[torch.float32] * abs(expected).max())

        def row(runtime: str, form: str, count: int) -> dict[str, Any]:
            return machine() | dict(
                network=name, runtime=runtime, form=form, processor=PROCESSOR, size=SIDE, instructions=count
            )

        count, result = ours(folder, model, x)
        if not agrees(result):
            raise RuntimeError(f"{name}: ours gives other numbers in emulation")
        yield row("mfkernels", "deployed", count)
        job = Job(formulations(model), x, 1)
        for runtime in RUNTIMES:
            path, out = folder / runtime, folder / "out.npy"
            found = []
            for form, write in written(runtime, job, path):
                try:
                    write()
                    python = ARM / "root" / "usr" / "bin" / "python3.11"
                    call = Path(__file__).with_name("call.py")
                    count = emulated(folder, python, call, runtime, path, folder / "image.npy", out, CALLS)
                    if not agrees(np.load(out)):
                        raise RuntimeError("its numbers differ")
                except Exception as error:  # converters raise whatever they like
                    words = str(error).strip().splitlines() or [type(error).__name__]
                    print(f"{name} in {runtime}: skipped, {form}: {words[0][:200]}", file=sys.stderr)
                    continue
                print(f"{name} in {runtime}, {form}: {count / 1e6:.1f} million", file=sys.stderr)
                found.append((count, form))
            if found:
                count, form = min(found)
                yield row(runtime, form, count)


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: millions of instructions, and ours in units of the fewest of others."""
    yield "| network | mfkernels | LiteRT | ncnn | ONNX Runtime | ours / fewest of others |"
    yield "|---|---|---|---|---|---|"
    for name in dict.fromkeys(row["network"] for row in found):
        counts = {row["runtime"]: row["instructions"] for row in found if row["network"] == name}
        others = [counts[runtime] for runtime in RUNTIMES if runtime in counts]
        cells = [f"{counts[r] / 1e6:.0f}" if r in counts else "-" for r in ("mfkernels", *RUNTIMES)]
        ratio = f"{counts['mfkernels'] / min(others):.2f}" if others else "-"
        yield f"| {' | '.join([name, *cells, ratio])} |"


def main() -> None:
    log = RESULTS / "arm-counts" / "results.jsonl"
    log.parent.mkdir(exist_ok=True)
    describe_processor()
    found = []
    for name in sys.argv[1:]:
        for row in rows(name):
            found.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()

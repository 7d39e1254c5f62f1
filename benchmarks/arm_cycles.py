"""Computes how well the innermost loops of the library for Arm use a processor's multiply-add pipes.

    python benchmarks/arm_cycles.py build/arm/lib/libmfkernels.so --mca llvm-mca-19

Reads the loops from the compiled library and asks llvm-mca for their cycles: figures of LLVM's model of a
processor whose caches never miss, not measured ones. Prints a table, a row for each kernel's fullest loop.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

# Multiply-adds of 16 bytes that a core begins in a cycle, and those that it does not have.
PIPES = {"neoverse-n1": 2, "neoverse-v2": 4}
LACKS = {"neoverse-n1": ("usmmla", "bf"), "neoverse-v2": ()}
PRODUCTS = ("fmla", "sdot", "usmmla", "bfmmla")
LEAST = 8  # multiply-adds of a loop that counts, which calls nothing
JUMP = re.compile(r"^(b(?:\.\w+)?|cbn?z|tbn?z)\t(?:.*, )?([0-9a-f]+) <")


class Loop(NamedTuple):
    kernel: str
    lines: list[str]

    @property
    def products(self) -> int:
        return sum(line.startswith(PRODUCTS) for line in self.lines)

    def needs(self, instructions: tuple[str, ...]) -> bool:
        return any(line.startswith(instructions) for line in self.lines)

    @property
    def on_stack(self) -> int:
        return sum("[sp" in line for line in self.lines)


def functions(library: str, objdump: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Yield each function's name and its instructions, with their addresses."""
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", library], capture_output=True, text=True)
    text.check_returncode()
    for part in text.stdout.split("\n\n"):
        head, *lines = part.strip().split("\n")
        name = re.match(r"[0-9a-f]+ <(.*)>:$", head)
        if name:
            split = [line.strip().split(":", 1) for line in lines if ":" in line]
            yield name[1], [(int(at, 16), rest.strip()) for at, rest in split]


COPIES = "7generic|11neondotprod|8neoni8mm|8neonbf16"
NAMESPACES = rf"_ZZ?NK?3mfk(?:{COPIES})(?:12_GLOBAL__N_1|6detail|9pointwise|4mmla)*"
ELEMENTS = {"f": "float", "d": "double", "h": "bytes", "a": "int8", "NS_4bf16E": "bfloat16"}


def kernel_name(symbol: str) -> str:
    """Return what a mangled name begins with below our namespaces, and the type of its elements, if any.

    Of products with weights that are widened in registers, theirs is in it, too.
    """
    found = re.match(NAMESPACES + r"(\d+)(.*)", symbol)
    if not found:
        return symbol
    name, rest = found[2][: int(found[1])], found[2][int(found[1]) :]
    element = re.match(r"I(?:L[ib]\d+E)*(f|d|h|NS_4bf16E)", rest)
    if element is None:
        return name
    widened = name == "gemm_tiles" and re.match(r"(a|NS_4bf16E)", rest[element.end() :])
    return f"{name}, {ELEMENTS[element[1]]}" + (f" by {ELEMENTS[widened[1]]}" if widened else "")


def innermost_loops(name: str, code: list[tuple[int, str]]) -> Iterator[Loop]:
    index = {at: i for i, (at, _) in enumerate(code)}
    since = 0  # the last jump before this one
    for i, (_, line) in enumerate(code):
        jump = JUMP.match(line)
        if jump is None:
            continue
        start = index.get(int(jump[2], 16), i + 1)
        if since <= start <= i:
            body = [line.split(" <")[0].split("\t//")[0] for _, line in code[start : i + 1]]
            body[-1] = body[-1].replace(jump[2], "LOOP")
            loop = Loop(kernel_name(name), body)
            if loop.products >= LEAST and not any(line.startswith(("bl", "adr")) for line in body):
                yield loop
        since = i + 1


def cycles(loops: list[Loop], mca: str, processor: str) -> list[float]:
    """Return a pass's cycles for each loop."""
    parts = [
        f"# LLVM-MCA-BEGIN {i}\nloop{i}:\n"
        + "\n".join(loop.lines).replace("LOOP", f"loop{i}")
        + f"\n# LLVM-MCA-END {i}\n"
        for i, loop in enumerate(loops)
    ]
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={processor}", "-iterations=100", "-json"]
    done = subprocess.run(command, input="".join(parts), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    regions = json.loads(done.stdout)["CodeRegions"]
    return [region["SummaryView"]["TotalCycles"] / 100 for region in regions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    parser.add_argument(
        "--mca", default="llvm-mca", help="of LLVM 17 or later: older ones have no such models"
    )
    options = parser.parse_args()
    loops = [
        loop
        for name, code in functions(options.library, options.objdump)
        for loop in innermost_loops(name, code)
    ]
    times: dict[str, dict[int, float]] = {}
    for processor in PIPES:
        able = [i for i, loop in enumerate(loops) if not loop.needs(LACKS[processor])]
        found = cycles([loops[i] for i in able], options.mca, processor)
        times[processor] = dict(zip(able, found, strict=True))
    print("| kernel | loops | products | instructions | on the stack | " + " | ".join(PIPES) + " |")
    print("|---" * (5 + len(PIPES)) + "|")
    for kernel in sorted({loop.kernel for loop in loops}):
        own = [i for i, loop in enumerate(loops) if loop.kernel == kernel]
        most = max(loops[i].products for i in own)
        fullest = [i for i in own if loops[i].products == most]
        cells = [kernel, len(own), most, max(len(loops[i].lines) for i in fullest)]
        cells.append(max(loops[i].on_stack for i in own))
        for processor, pipes in PIPES.items():
            known = [times[processor][i] for i in fullest if i in times[processor]]
            cells.append(f"{max(known):.1f} ({100 * most / pipes / max(known):.0f} %)" if known else "-")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()

"""What is measured, and how."""

import copy
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C, __version__, native, progress
from ..backends import use_backend
from ..checks import tensors_in
from ..deploy import deploy
from ..info import cpu_name
from ..models import create_model, list_models
from ..nn import DynamicResidualConv2d
from .runtimes import RUNTIMES, Call, Skipped, result_of

UNTIMED, TIMED = 2, 4  # calls of a network in each round


@dataclass
class Entry:
    """One network in one runtime at one size. Milliseconds a call: median, and the middle half's borders."""

    network: str
    runtime: str
    size: int
    batch: int
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    calls: int
    dtype: str
    difference: float  # largest from eager, relative to the largest output


def bench(
    networks: Sequence[str],
    runtimes: Sequence[str],
    sizes: Sequence[int],
    *,
    batch: int = 1,
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
    seconds: float = 10.0,
    log: Path | None = None,
) -> list[Entry]:
    """Time every network in every runtime at every size.

    At each size all of them run in turn, round after round, so that a drift of the machine meets all alike.
    In a round each runs some calls untimed, which bring its weights into cache, and some timed. Pinned to as
    many cores as there are threads; random images.

    Args:
        networks: names of `mfkernels.models.list_models()` or of `rivals()`.
        runtimes: names of `RUNTIMES`; what is not installed is skipped with a word.
        sizes: image sides in pixels.
        batch: images a call.
        threads: of every runtime.
        dtype: torch.float32 or torch.bfloat16.
        seconds: of measurement, for each size and network in a runtime.
        log: a file to which each entry is appended as a line of JSON.

    Raises:
        ValueError: an unknown name.
    """
    for name in runtimes:
        if name not in RUNTIMES:
            raise ValueError(f"bench: runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
    entries: list[Entry] = []
    with pinned(threads), torch.inference_mode():
        for size in sizes:
            calls = {}
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
            for name in networks:
                for runtime, call in _prepared(name, runtimes, x, threads):
                    calls[name, runtime] = call
            entries += _measure(calls, x, threads, seconds)
            calls.clear()
            torch.compiler.reset()
            gc.collect()
            if log is not None:
                with log.open("a") as file:
                    for entry in entries:
                        if entry.size == size:
                            file.write(json.dumps(machine() | asdict(entry)) + "\n")
    return entries


def rivals() -> dict[str, Any]:
    """The papers' rivals, from the folder `benchmarks` of a source tree; empty without one."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / "rivals.py").is_file():
        return {}
    sys.path.insert(0, str(folder))
    import rivals  # type: ignore[import-not-found]

    return {
        "mobilenet_v3_large": rivals.mobilenet_v3_large,
        "shufflenet_v2_2x": rivals.shufflenet_v2_2x,
    }


def network(name: str) -> nn.Module:
    """A network with random weights that are not degenerate, in eval mode."""
    others = rivals()
    if name not in list_models() and name not in others:
        names = ", ".join([*list_models(), *others])
        raise ValueError(f"bench: network must be one of {names}, got {name!r}")
    torch.manual_seed(0)
    model = others[name]() if name in others else create_model(name)
    randomise(model)
    return model.eval()


def randomise(model: nn.Module, images: Tensor | None = None) -> None:
    """Weights under which every part of a network does something: at the released initialisation the dynamic
    activations hardly differ from static ones. Batch norms take their statistics from the images."""
    generator = torch.Generator().manual_seed(0)
    norms = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            norms.append((module, module.momentum))
            module.momentum = 1.0
    if images is None:
        images = torch.randn(4, 3, 224, 224, generator=generator)
    for parameter in model.parameters():  # those that begin as zeros: dynamic kernels, GRN's
        if parameter.dim() > 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    model.train()
    with torch.inference_mode(False), torch.no_grad(), use_backend("reference"):
        model(images.clone())
    for norm, momentum in norms:
        norm.momentum = momentum


def _prepared(name: str, runtimes: Sequence[str], x: Tensor, threads: int) -> Iterator[tuple[str, Call]]:
    with torch.inference_mode(False):
        model = network(name)
        for runtime in runtimes:
            progress.show(f"preparing {name} in {runtime}")
            try:
                with torch.no_grad():
                    yield runtime, RUNTIMES[runtime](copy.deepcopy(model), x, threads)
            except Skipped as reason:
                progress.show(f"{name} in {runtime}: skipped, {reason}", keep=True)


def _measure(calls: dict[tuple[str, str], Call], x: Tensor, threads: int, seconds: float) -> list[Entry]:
    batch, _, _, size = x.shape
    expected = {name: result_of(call) for (name, runtime), call in calls.items() if runtime == "eager"}
    differences = {}
    for key, call in calls.items():
        got, wanted = result_of(call), expected.get(key[0])
        differences[key] = float("nan")
        if wanted is not None:
            differences[key] = float(abs(got - wanted).max() / abs(wanted).max())
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds * len(calls) or len(next(iter(times.values()))) < 2 * TIMED:
        for key, call in calls.items():
            for _ in range(UNTIMED):
                call()
            for _ in range(TIMED):
                begin = time.perf_counter()
                call()
                times[key].append(1e3 * (time.perf_counter() - begin))
        done = min(99, int(100 * (time.perf_counter() - start) / (seconds * len(calls))))
        progress.show(f"{size}x{size}: {done} %")
    progress.show("")
    entries = []
    for (name, runtime), values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        middle = statistics.median(values)
        entries.append(
            Entry(
                *(name, runtime, size, batch, threads, middle, low, high, len(values)),
                dtype=str(x.dtype)[6:],
                difference=differences[name, runtime],
            )
        )
    return entries


def profile(name: str, size: int, rounds: int = 50) -> list[dict[str, Any]]:
    """Where the time of a deployed network goes, on one thread, batch 1.

    Returns for each part: microseconds (median), floating-point operations of its convolutions and linear
    layers (two a multiply-add, padding not counted), and the bytes of its weights and of the maps that it
    reads and writes.

    Raises:
        ValueError: an unknown name, or a network that deploy does not take.
    """
    if name not in list_models():
        raise ValueError(f"profile: network must be one of {', '.join(list_models())}, got {name!r}")
    x = torch.randn(1, 3, size, size)
    model = network(name)
    deployed: Any = deploy(model)
    with pinned(1), torch.inference_mode():
        runs = [deployed.times(x) for _ in range(rounds)]
        costs = _costs(model, x, list(runs[0]))
    rows = []
    for part in runs[0]:
        operations, moved = costs.get(part, (0, 0))
        microseconds = 1e6 * statistics.median(run[part] for run in runs)
        rows.append({"part": part, "microseconds": microseconds, "operations": operations, "bytes": moved})
    return rows


def _costs(model: nn.Module, x: Tensor, parts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Operations and bytes by part, counted while the plain network runs."""
    costs = dict.fromkeys(parts, (0, 0))

    def add(part: str, operations: int, values: int) -> None:
        before = costs[part]
        costs[part] = (before[0] + operations, before[1] + 4 * values)

    def count(part: str, module: nn.Module, inputs: Any, output: Any) -> None:
        weight: Any = module.weight
        kernel: Any = getattr(module, "static_weight", weight)
        mixed = 0 if kernel is weight else weight.numel()  # kernels that are mixed to one
        per_output = kernel.numel() // kernel.shape[0]
        add(part, 2 * output.numel() * per_output + 2 * mixed, kernel.numel() + mixed)

    def maps(part: str, module: nn.Module, inputs: Any, output: Any) -> None:
        add(part, 0, sum(t.numel() for t in tensors_in((inputs, output)) if t.dim() == 4))

    handles = []
    for name, module in model.named_modules():
        part = _part(name, parts)
        if part and isinstance(module, nn.Conv2d | nn.Linear | DynamicResidualConv2d):
            handles.append(module.register_forward_hook(functools.partial(count, part)))
        elif name in parts:
            handles.append(module.register_forward_hook(functools.partial(maps, name)))
    with use_backend("reference"):
        model(x)
    for handle in handles:
        handle.remove()
    return costs


_OF_TOKENS = ("local_global", "global_block", "global_local", "hyper", "former", "mobile2former")


def _part(name: str, parts: Sequence[str]) -> str:
    """The part, of those that a deployed network names, to which a module belongs: the longest name above its
    own. Modules that work on tokens belong to the parts with " tokens" behind them, where there are such."""
    words = name.split(".")
    found = [".".join(words[:count]) for count in range(len(words), 0, -1)]
    above = next((part for part in found if part in parts), "")
    tokens = f"{above} tokens"
    inner = any(word.startswith(_OF_TOKENS) for word in words)
    return tokens if inner and tokens in parts else above


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """So many threads on so many cores."""
    before, count = None, torch.get_num_threads()
    if hasattr(os, "sched_getaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(before)[:threads])
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        if before is not None:
            os.sched_setaffinity(0, before)


def peak_flops() -> float:
    """The float32 operations a second of one pinned thread, measured, in the instruction set in use."""
    with pinned(1):
        return _C.peak_flops()


def machine() -> dict[str, str]:
    return {
        "cpu": cpu_name(),
        "instruction_set": native.instruction_set(),
        "torch": torch.__version__,
        "mfkernels": __version__,
    }

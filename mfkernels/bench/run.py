"""Measure networks in all runtimes."""

import datetime
import functools
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C, __version__, native, progress
from ..backends import use_backend
from ..checks import tensors_in
from ..deploy import deploy
from ..info import cpu_name
from ..models import create_model, list_models
from ..nn import DynamicResidualConv2d
from .runtimes import RUNTIMES, Call, Job, Skipped, result_of, version

UNTIMED, TIMED = 1, 4  # calls of a network in each round, after the cold one
# The largest difference from eager float32, relative to the largest output, that a form may have. Networks of
# random weights hardly survive static quantisation: what it costs them is told beside its time.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.int8: math.inf}
# On a family's next network: the best forms, at most this number, none slower than the best by this factor.
TRIED, CLOSE = 2, 1.15

Key = tuple[str, str, torch.dtype]
# Family, runtime, dtype, whether images are large: the forms that were close to the best.
Favourites = dict[tuple[str, str, torch.dtype, bool], list[str]]
LARGE = 512


@dataclass
class Entry:
    """One network in one runtime at one size. Milliseconds a call: median, and the middle half's borders.

    `cold_ms` is the median of calls before each of which the caches were filled with something else.
    """

    network: str
    runtime: str
    form: str  # the fastest of the runtime's
    version: str  # of the runtime
    size: int
    batch: int
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    calls: int
    dtype: str
    difference: float  # largest from eager float32, relative to the largest output
    cold_ms: float | None = None  # None: an older result, without it


@dataclass
class Chosen:
    """A form of a network in a runtime, how it is called, and how far its numbers are off."""

    form: str
    call: Call
    difference: float


def bench(
    networks: Sequence[str],
    runtimes: Sequence[str],
    sizes: Sequence[int],
    *,
    batch: int = 1,
    threads: int = 1,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    seconds: float = 10.0,
    log: Path | None = None,
    favourites: Favourites | None = None,
) -> list[Entry]:
    """Time every network in every runtime at every size.

    A runtime may have several forms of a network: of its formulations, by its exporters. Each is made and
    compared with the float32 network; the fastest whose numbers agree is measured.

    At each size all of them run in turn, round after round, so that a drift of the machine meets all alike.
    In a round each runs one call with cold caches, one untimed, which brings its weights into cache, and some
    timed. Pinned to as many cores as there are threads; random images.

    Args:
        networks: names of `mfkernels.models.list_models()` or of `rivals()`.
        runtimes: names of `RUNTIMES`; what is not installed is skipped with a word.
        sizes: image sides in pixels.
        batch: images a call.
        threads: of every runtime.
        dtypes: of torch.float32, torch.bfloat16 and torch.int8, which stands for static quantisation.
        seconds: of measurement, for each size and network in a runtime.
        log: a file to which each entry is appended as a line of JSON.
        favourites: which forms of a family were near the best; added to, and the only ones tried where it
            knows of some, in float32 at least. None: all forms of each network are tried.

    Raises:
        ValueError: an unknown name.
    """
    for name in runtimes:
        if name not in RUNTIMES:
            raise ValueError(f"bench: runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
    entries: list[Entry] = []
    with pinned(threads), torch.inference_mode():
        for size in sizes:
            chosen: dict[Key, Chosen] = {}
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            for name in networks:
                for runtime, dtype, one in _prepared(name, runtimes, dtypes, x, threads, favourites):
                    chosen[name, runtime, dtype] = one
            if chosen:
                entries += measure(chosen, x, threads, seconds)
            chosen.clear()
            torch.compiler.reset()
            gc.collect()
            if log is not None:
                with log.open("a") as file:
                    for entry in entries:
                        if entry.size == size:
                            file.write(json.dumps(machine() | asdict(entry)) + "\n")
    return entries


def rivals() -> dict[str, Any]:
    """Return the papers' rivals, from the folder `benchmarks` of a source tree; empty without one."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / "rivals.py").is_file():
        return {}
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import rivals  # type: ignore[import-not-found]

    return {
        "mobilenet_v3_large": rivals.mobilenet_v3_large,
        "shufflenet_v2_2x": rivals.shufflenet_v2_2x,
    }


def network(name: str) -> nn.Module:
    """Return a network with random weights that are not degenerate, in eval mode."""
    others = rivals()
    if name not in list_models() and name not in others:
        names = ", ".join([*list_models(), *others])
        raise ValueError(f"bench: network must be one of {names}, got {name!r}")
    torch.manual_seed(0)
    model = others[name]() if name in others else create_model(name)
    randomise(model)
    return model.eval()


def randomise(model: nn.Module, images: Tensor | None = None) -> None:
    """Set weights under which every part of a network does something.

    At the released initialisation the dynamic activations hardly differ from static ones. Batch norms take
    their statistics from the images.
    """
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


def formulations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the network as it is defined and, for ours, in a form that exports well.

    The second form is in the folder `benchmarks` of a source tree.
    """
    result = {"definition": model}
    if rivals():
        from exportable import exportable  # type: ignore[import-not-found]

        with suppress(ValueError):
            result["exportable"] = exportable(model)
    return result


def _prepared(
    name: str,
    runtimes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    x: Tensor,
    threads: int,
    favourites: Favourites | None,
) -> Iterator[tuple[str, torch.dtype, Chosen]]:
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        model = network(name)
        with use_backend("reference"):
            expected = model(x).numpy()
        job = Job(formulations(model), x, threads)
        for dtype, runtime in itertools.product(dtypes, runtimes):
            what = f"{name} in {runtime}, {str(dtype)[6:]}"
            progress.show(f"preparing {what}")
            family, large = type(model).__name__ if name in list_models() else name, x.shape[2] > LARGE
            known = favourites or {}
            wanted = known.get((family, runtime, dtype, large))
            wanted = wanted or known.get((family, runtime, torch.float32, large))
            own = replace(job, dtype=dtype)
            try:
                times = forms_of(what, runtime, own, expected, wanted)
                if wanted and not times:
                    times = forms_of(what, runtime, own, expected)
                if not times:
                    raise Skipped("none of its forms runs and gives the right numbers")
            except Skipped as reason:
                progress.show(f"{what}: skipped, {reason}", keep=True)
                continue
            times.sort(key=lambda pair: pair[0])
            best, chosen = times[0]
            if favourites is not None:
                close = [one.form for middle, one in times[:TRIED] if middle <= CLOSE * best]
                favourites.setdefault((family, runtime, dtype, large), close)
            yield runtime, dtype, chosen


def forms_of(
    what: str, runtime: str, job: Job, expected: np.ndarray, wanted: list[str] | None = None
) -> list[tuple[float, Chosen]]:
    """Return the forms of a network in a runtime that run and agree, each with a rough time.

    Args:
        what: the network and the runtime, for messages.
        runtime: one of `RUNTIMES`.
        job: the network.
        expected: its first result in eager float32.
        wanted: names of forms; None for all.
    """
    made = []
    for form, make in RUNTIMES[runtime](job):
        if wanted is not None and form not in wanted:
            continue
        progress.show(f"preparing {what}, {form}")
        try:
            call = make()
            with torch.inference_mode():
                difference = difference_of(call, expected)
            if not difference <= LIMITS[job.dtype]:
                raise Skipped(f"its numbers differ by {difference:.1g} of the largest")
        except Exception as error:  # converters raise whatever they like
            words = str(error).strip().splitlines() or [type(error).__name__]
            progress.show(f"{what}: skipped, {form}: {words[0][:200]}", keep=True)
            continue
        made.append(Chosen(form, call, difference))
    return list(zip(_rough_times([one.call for one in made]), made, strict=True))


def difference_of(call: Call, expected: np.ndarray) -> float:
    """Return how far a network's result is off, relative to the largest number of the expected one."""
    return float(abs(result_of(call) - expected).max() / abs(expected).max())


@torch.inference_mode()
def _rough_times(calls: list[Call]) -> list[float]:
    """Medians of a few calls in turn; without a rival a call needs none."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(calls) > 1 and (len(times[0]) < 2 or time.perf_counter() - start < 0.4 * len(calls)):
        for call, own in zip(calls, times, strict=True):
            call()
            own.append(_time(call))
    return [statistics.median(own or [0.0]) for own in times]


def _time(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def measure(chosen: dict[Key, Chosen], x: Tensor, threads: int, seconds: float) -> list[Entry]:
    """Time all of them in turn, for so many seconds each, as `bench` tells; the images are `x`."""
    batch, _, _, size = x.shape
    times: dict[Key, list[float]] = {key: [] for key in chosen}
    cold: dict[Key, list[float]] = {key: [] for key in chosen}
    filler = np.ones(2 * _last_cache(), np.uint8)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds * len(chosen) or len(next(iter(times.values()))) < 2 * TIMED:
        for key, one in chosen.items():
            filler += 1
            cold[key].append(_time(one.call))
            for _ in range(UNTIMED):
                one.call()
            times[key] += [_time(one.call) for _ in range(TIMED)]
        done = min(99, int(100 * (time.perf_counter() - start) / (seconds * len(chosen))))
        progress.show(f"{size}x{size}: {done} %")
    progress.show("")
    entries = []
    for (name, runtime, dtype), values in times.items():
        one = chosen[name, runtime, dtype]
        low, _, high = statistics.quantiles(values, n=4)
        middle = statistics.median(values)
        entries.append(
            Entry(
                *(name, runtime, one.form, version(runtime)),
                size,
                batch,
                threads,
                *(middle, low, high),
                calls=len(values),
                dtype=str(dtype)[6:],
                difference=one.difference,
                cold_ms=statistics.median(cold[name, runtime, dtype]),
            )
        )
    return entries


def _last_cache() -> int:
    """Return the bytes of the processor's largest cache; 64 MiB where the system does not tell."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((1024 * int(size.strip().removesuffix("K")) for size in sizes), default=64 << 20)


def profile(name: str, size: int, rounds: int = 50) -> list[dict[str, Any]]:
    """Tell where the time of a deployed network goes, on one thread, batch 1.

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
    """Return the part of a deployed network to which a module belongs.

    It is the part with the longest name above the module's own. Modules that work on tokens belong to the
    parts with " tokens" behind them, where there are such parts.
    """
    words = name.split(".")
    found = [".".join(words[:count]) for count in range(len(words), 0, -1)]
    above = next((part for part in found if part in parts), "")
    tokens = f"{above} tokens"
    inner = any(word.startswith(_OF_TOKENS) for word in words)
    return tokens if inner and tokens in parts else above


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Run in the block with this number of threads, on as many cores."""
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
    """Measure the float32 operations a second of one pinned thread, in the instruction set in use."""
    with pinned(1):
        return _C.peak_flops()


def machine() -> dict[str, str]:
    """Return where and when this runs, with which every line of results begins."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "instruction_set": native.instruction_set(),
        "torch": torch.__version__,
        "mfkernels": __version__,
    }

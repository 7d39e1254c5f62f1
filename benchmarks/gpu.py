"""What mfkernels gains on a GPU, and what bounds it.

    python benchmarks/gpu.py OUTDIR [PART ...]

The parts are smoke, compile, latency, large, streams, training, operators, former, bottleneck, attention,
trace, report; by default all. `smoke` sees whether anything works; `compile` has all processors compile what
tests and networks launch, for which they would wait one by one. Each result is a line of OUTDIR/results.jsonl
as soon as it is there; `report` makes table.md and ratios.png of them, and `trace` a timeline for a browser
(chrome://tracing). Rivals are the same networks of PyTorch's own operators: eagerly, in a CUDA graph and
compiled, in bfloat16 and float16, contiguous and channels last; of all that the fastest counts. Ways take
turns, round after round; times are medians.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfkernels
from mfkernels import ops
from mfkernels.bench.run import network
from mfkernels.checks import tensors_in
from mfkernels.deploy.gpu.activated_depthwise import activated_depthwise
from mfkernels.deploy.gpu.dynamic_bottleneck import dynamic_bottleneck
from mfkernels.deploy.gpu.graph import Captured
from mfkernels.operators.dispatch import TRITON_INSTALLED

FORMATS = {"": torch.contiguous_format, " channels last": torch.channels_last}
Way = Callable[[], Any]


class Bench:
    """Where results go, and how much is measured.

    Args:
        out: the folder.
        device: "cuda"; "cpu" only shows that the script works.
        quick: a glance: small inputs, few rounds.
        mode: of torch.compile; "" leaves it out.
    """

    def __init__(self, out: Path, device: str, quick: bool, mode: str) -> None:
        self.out, self.device, self.quick, self.mode = out, torch.device(device), quick, mode
        self.halves = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float16)
        out.mkdir(parents=True, exist_ok=True)

    def images(self, batch: int, size: int) -> Tensor:
        batch, size = (min(batch, 2), 32) if self.quick else (batch, size)
        return torch.randn(batch, 3, size, size, device=self.device)

    def network(self, name: str) -> nn.Module:
        return network("mobile_former_26m" if self.quick and name.startswith("mobile_f") else name).to(
            self.device
        )

    def add(
        self, part: str, what: str, ours: float, others: dict[str, float], unit: str, goal: float
    ) -> None:
        """Return a ratio: how many times better ours is than the best of the others."""
        more = unit == "images/s"
        best = (max if more else min)(others, key=others.__getitem__)
        ratio = ours / others[best] if more else others[best] / ours
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        row = dict(part=part, what=what, ours=ours, best=others[best], it_is=best, ratio=ratio, goal=goal)
        line = json.dumps(row | dict(unit=unit, others=others, device=name, torch=torch.__version__))
        print(line, flush=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    def times(self, ways: dict[str, Way], calls: int = 10) -> dict[str, float]:
        """Milliseconds of a call. A way that raises is left out, with a word."""
        taken: dict[str, list[float]] = {}
        for name, way in ways.items():
            try:
                for _ in range(1 if self.quick else 3):
                    way()
                taken[name] = []
            except Exception as error:  # out of memory, a compiler's complaint
                print(f"{name}: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
        for _ in range(2 if self.quick else 20):
            for name in taken:
                taken[name].append(self._time(ways[name], 1 if self.quick else calls))
        return {name: statistics.median(values) for name, values in taken.items()}

    def _time(self, way: Way, calls: int) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                way()
            return 1e3 * (time.perf_counter() - start) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            way()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / calls


def split(times: dict[str, float], first: str = "ours") -> tuple[float, dict[str, float]]:
    """Return the fastest of our ways, whose names begin so, and all others."""
    others = {name: value for name, value in times.items() if not name.startswith(first)}
    return min(value for name, value in times.items() if name.startswith(first)), others


def plain(run: Way) -> Way:
    """With PyTorch's own operators."""

    def call() -> Any:
        with mfkernels.use_backend("reference"):
            return run()

    return call


def inference_ways(bench: Bench, model: nn.Module, x: Tensor, ours: bool = True) -> dict[str, Way]:
    ways: dict[str, Way] = {}
    gpu = bench.device.type == "cuda"
    for dtype in bench.halves:
        for words, layout in FORMATS.items():
            image = x.to(dtype=dtype, memory_format=layout)
            own = copy.deepcopy(model).to(memory_format=layout)
            half = copy.deepcopy(own).to(dtype)
            label = f"{str(dtype)[6:]}{words}"
            if ours:
                fast = mfkernels.deploy(own, dtype=dtype)
                ways[f"ours {label}"] = lambda fast=fast, image=image: fast(image)
            ways[f"eager {label}"] = plain(lambda half=half, image=image: half(image))
            if gpu:
                graph = Captured([copy.deepcopy(own)], dtype)
                ways[f"graph {label}"] = plain(lambda graph=graph, image=image: graph(image))
            if bench.mode and dtype == bench.halves[0]:
                compiled = torch.compile(half, mode=bench.mode)
                ways[f"compiled {label}"] = plain(lambda compiled=compiled, image=image: compiled(image))
    return ways


SMALL = ("mobile_former_26m", "dmf_96", "iformer_t")
LATENCY = [("mobile_former_214m", 1, 2.0), ("mobile_former_294m", 1, 2.0), ("dmf_s", 1, 1.5)]
LATENCY += [("iformer_m", 1, 1.2), ("dmf_s", 64, 1.5), ("iformer_m", 64, 1.2)]


def smoke(bench: Bench) -> None:
    """Compare the smallest network of each family, deployed, and an operator with PyTorch on the CPU.

    The operator is compared with its gradients.
    """
    checks: dict[str, Callable[[], float]] = {
        f"{name}, deployed": partial(_network_error, bench, name) for name in SMALL
    }
    checks["dynamic_relu, forward and backward"] = partial(_operator_error, bench)
    failed = 0
    for what, error_of in checks.items():
        start = time.perf_counter()
        try:
            error = error_of()
            right = error <= 1e-3  # not of NaN
            said = f"{'right' if right else 'WRONG'}, differs by {error:.1e} of the largest number"
        except Exception as error:  # whatever a first contact brings
            right, said = False, f"FAILED, {type(error).__name__}: {error}"
        failed += not right
        print(f"{what}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
    if failed:
        sys.exit(f"smoke: {failed} of {len(checks)} failed")


def _network_error(bench: Bench, name: str) -> float:
    model, x = network(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain(lambda: model(x))()
        return _largest_error([mfkernels.deploy(model.to(bench.device))(x.to(bench.device))], [expected])


def _operator_error(bench: Bench) -> float:
    x, slopes = torch.randn(2, 24, 14, 14), torch.randn(2, 2, 24)

    def run(device: torch.device) -> list[Tensor]:
        inputs = [t.to(device).requires_grad_() for t in (x, slopes)]
        out = ops.dynamic_relu(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    return _largest_error(run(bench.device), plain(lambda: run(torch.device("cpu")))())


def _largest_error(ours: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(ours, expected, strict=True)
    return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in pairs)


def compile(bench: Bench) -> None:
    """Has in Triton's cache what tests and networks launch."""
    if not TRITON_INSTALLED:
        print("Triton is not installed")
        return
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import triton_compile
    from triton.runtime import driver

    start, target = time.perf_counter(), triton_compile.TARGETS["sm_90"]
    if bench.device.type == "cuda":
        target = driver.active.get_current_target()
    variants = triton_compile.to_be_launched(target, tuple({name for name, *_ in LATENCY}), bench.quick)
    print(f"{len(variants)} variants, known after {time.perf_counter() - start:.0f} s", flush=True)
    failed = 0
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(triton_compile.in_cache, *variant) for variant in variants]
        for variant, job in zip(variants, jobs, strict=True):
            if (error := job.exception()) is not None:
                failed += 1
                print(f"not compiled: {variant[1]}: {error}", flush=True)
    print(f"compiled {len(variants) - failed} variants after {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"compile: {failed} of {len(variants)} failed")


def latency(bench: Bench) -> None:
    for name, batch, goal in LATENCY[: 1 if bench.quick else None]:
        with torch.no_grad():
            model, x = bench.network(name), bench.images(batch, 224)
            ours, others = split(bench.times(inference_ways(bench, model, x)))
        bench.add("latency", f"{name}, batch {batch}, 224x224", ours, others, "ms", goal)


def large(bench: Bench) -> None:
    best = {}
    for name in ("mobile_former_214m", "mobilenet_v3_large", "shufflenet_v2_2x"):
        with torch.no_grad():
            ours = name.startswith("mobile_former")
            ways = inference_ways(bench, bench.network(name), bench.images(1, 2048), ours)
            if ours:
                ways = {key: way for key, way in ways.items() if key.startswith("ours")}
            best[name] = 1e3 / min(bench.times(ways, calls=3).values())
    own = best.pop("mobile_former_214m")
    bench.add("large", "mobile_former_214m at 2048x2048", own, best, "images/s", 1.2)


def streams(bench: Bench) -> None:
    """Time a block of mobile_former_214m: both halves alone, one after the other and side by side."""
    block = (
        mfkernels.nn.MobileFormerBlock(40, 40, expansion=4, token_dim=192, token_num=6)
        .eval()
        .to(bench.device)
    )
    for batch in (1, 64)[: 1 if bench.quick else None]:
        x = torch.randn(batch, 40, 28, 28, device=bench.device)
        tokens = torch.randn(6, batch, 192, device=bench.device)

        def former(x: Tensor = x, tokens: Tensor = tokens) -> Any:
            return block._slopes(block.global_block(block.local_global(x, tokens, return_logits=False)[0]))

        def together(on: bool, x: Tensor = x, tokens: Tensor = tokens) -> Any:
            with mfkernels.use_streams(on):
                return block(x, tokens)

        runs: dict[str, Way] = {
            "ours, side by side": lambda together=together: together(True),
            "one stream": lambda together=together: together(False),
            "Former alone": former,
            "Mobile's first convolution alone": lambda x=x: block.conv1(x),
        }
        with torch.no_grad():
            ways = {name: _recorded(run) if x.is_cuda else run for name, run in runs.items()}
            times = bench.times(ways, calls=50)
        ours = times.pop("ours, side by side")
        bench.add("streams", f"block, batch {batch}", ours, {"one stream": times["one stream"]}, "ms", 1.3)
        # At best the shorter half costs nothing: what comes after both, and the longer one.
        halves = times["Former alone"], times["Mobile's first convolution alone"]
        bound = times["one stream"] - min(halves)
        bench.add("streams", f"block, batch {batch}, to its bound", ours, {"longer half": bound}, "ms", 0.95)


def _recorded(run: Way) -> Way:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def training(bench: Bench) -> None:
    """Time and peak memory of a step under autocast."""
    for name in ("mobile_former_214m", "iformer_m")[: 1 if bench.quick else None]:
        x = bench.images(256, 224)
        times, peaks = {}, {}
        for label in ("ours", "eager", "compiled" if bench.mode else "eager"):
            model = bench.network(name).train()
            run: Any = torch.compile(model) if label == "compiled" else model
            step = _step(run, model, x)
            step = step if label == "ours" else plain(step)
            step()
            if x.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            times |= bench.times({label: step}, calls=2)
            peaks[label] = torch.cuda.max_memory_allocated() / 2**20 if x.is_cuda else 1.0
            del model, run, step
        ours, memory = times.pop("ours"), peaks.pop("ours")
        bench.add("training", f"{name}, step, batch {len(x)}", ours, times, "ms", 1.4)
        rival = min(times, key=times.__getitem__)
        bench.add("training", f"{name}, peak memory", memory, {rival: peaks[rival]}, "MiB", 1 / 0.7)


def _step(run: Any, model: nn.Module, x: Tensor) -> Way:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = sum(out.float().square().mean() for out in tensors_in(run(x)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def operators(bench: Bench) -> None:
    """Those that move more than they compute, against a copy of as many bytes."""
    batch, side = (1, 8) if bench.quick else (64, 112)
    C, M, heads = 96, 6, 2
    dtype = bench.halves[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=bench.device, dtype=dtype)

    x, tokens = normal(batch, C, side, side), normal(batch, M, C)
    slopes, row = normal(batch, 2, C), normal(C).abs()
    # And how often they must move a map: the norm needs one reading before the other.
    calls = {
        "dynamic_relu": (lambda: ops.dynamic_relu(x, slopes), 2),
        "mobile_to_former_attention": (lambda: ops.mobile_to_former_attention(x, tokens, heads), 1),
        "former_to_mobile_attention": (lambda: ops.former_to_mobile_attention(x, tokens, tokens, heads), 2),
        "global_response_norm": (lambda: ops.global_response_norm(x, row, row), 3),
        "batch_norm": (lambda: ops.batch_norm(x, row, row, row, row, 1e-5, "gelu"), 2),
    }
    target = torch.empty_like(x)
    with torch.no_grad():
        for name, (run, moved) in calls.items():
            times = bench.times({"ours": run, "copy": lambda: target.copy_(x)})
            # The copy reads the map and writes it: two.
            others = {"copy of as many bytes": times["copy"] * moved / 2}
            bench.add("operators", f"{name} {tuple(x.shape)}", times["ours"], others, "ms", 0.85)


def former(bench: Bench) -> None:
    """Time the Former of mobile_former_214m by both kinds of kernels, to choose the default."""
    block = mfkernels.nn.Former(192, num_heads=4).eval().to(bench.device, bench.halves[0])
    for batch in (1, 64)[: 1 if bench.quick else None]:
        tokens = torch.randn(6, batch, 192, device=bench.device, dtype=bench.halves[0])

        def by(backend: str, tokens: Tensor = tokens) -> Way:
            def run() -> Any:
                with mfkernels.use_backend(backend):
                    return block(tokens)

            return _recorded(run) if tokens.is_cuda else run

        with torch.no_grad():
            names = ("cuda", "triton") if bench.device.type == "cuda" else ("cpu", "reference")
            times = bench.times({name: by(name) for name in names}, calls=50)
        bench.add("former", f"former_block, batch {batch}", times.pop(names[0]), times, "ms", 1.0)


def bottleneck(bench: Bench) -> None:
    """Time Mobile of mobile_former_214m's blocks, and the bridge to it, in one, four and six kernels.

    Of the four, one has the depthwise convolution and the activations around it.
    """
    cases = [(1, 40, 160, 28), (64, 40, 160, 28), (64, 112, 672, 14), (1, 40, 160, 256)]
    for batch, C, E, side in cases[: 1 if bench.quick else None]:
        dtype, gpu = bench.halves[0], bench.device.type == "cuda"

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=bench.device, dtype=dtype)  # noqa: B023

        slopes = normal(batch, 2, E), normal(batch, 2, E)
        weights = normal(E, C, 1, 1), normal(E), normal(E, 1, 3, 3), normal(E), normal(C, E, 1, 1), normal(C)
        bridge, depthwise = (normal(batch, 6, C), normal(batch, 6, C), 2), weights[2:4]

        def in_four(hidden: Tensor, slopes: Any = slopes, depthwise: Any = depthwise) -> Tensor:
            return activated_depthwise(hidden, slopes[0], *depthwise, slopes[1])

        def in_six(hidden: Tensor, slopes: Any = slopes, depthwise: Any = depthwise) -> Tensor:
            hidden = ops.dynamic_relu(hidden, slopes[0])
            hidden = F.conv2d(hidden, *depthwise, padding=1, groups=hidden.shape[1])
            return ops.dynamic_relu(hidden, slopes[1])

        def around(middle: Any, x: Tensor, w: Any = weights, bridge: Any = bridge) -> Tensor:
            hidden = middle(F.conv2d(x, *w[:2]))
            return ops.former_to_mobile_attention(F.conv2d(hidden, *w[4:]) + x, *bridge)

        ways: dict[str, Way] = {}
        for words, layout in FORMATS.items():
            x = normal(batch, C, side, side).to(memory_format=layout)
            runs: dict[str, Way] = {
                "in one": partial(dynamic_bottleneck, x, *slopes, *weights, *bridge, True),
                "in four": partial(around, in_four, x),
                "in six": partial(around, in_six, x),
            }
            ways |= {f"{name}{words}": _recorded(run) if gpu else run for name, run in runs.items()}
        with torch.no_grad():
            times = bench.times(ways, calls=50)
        what = f"{C}-{E}-{C}, {side}x{side}, batch {batch}"
        for kernel, name in (("dynamic_bottleneck", "in one"), ("activated_depthwise", "in four")):
            bench.add("bottleneck", f"{kernel} in {what}", *split(times, name), "ms", 1.0)


def attention(bench: Bench) -> None:
    for D, C, side in ((96, 192, 14), (48, 96, 28), (96, 384, 7))[: 1 if bench.quick else None]:
        batch, dtype = 2 if bench.quick else 64, bench.halves[0]
        q, k, v, gate = (
            torch.randn(batch, n, side, side, device=bench.device, dtype=dtype) for n in (D, D, C, C)
        )

        def apart(q: Tensor = q, k: Tensor = k, v: Tensor = v, gate: Tensor = gate) -> Tensor:
            rows = [t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (q, k, torch.sigmoid(v))]
            out = F.scaled_dot_product_attention(*rows).squeeze(1)
            return out.transpose(1, 2).reshape(gate.shape) * torch.sigmoid(gate)

        ways: dict[str, Way] = {"ours": lambda a=(q, k, v, gate): ops.modulation_attention(*a), "SDPA": apart}
        with torch.no_grad():
            times = bench.times(ways)
        what = f"modulation_attention D={D} C={C} {side}x{side}, batch {batch}"
        bench.add("attention", what, times.pop("ours"), times, "ms", 1.3)


def trace(bench: Bench) -> None:
    model, x = mfkernels.deploy(bench.network("mobile_former_214m")), bench.images(1, 224)
    for _ in range(3):
        model(x)
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            model(x)
    profiler.export_chrome_trace(str(bench.out / "trace.json"))


def report(bench: Bench) -> None:
    rows = [json.loads(line) for line in (bench.out / "results.jsonl").read_text().splitlines()]
    titles = ("part", "what", "ours", "best other", "it is", "unit", "ratio", "goal", "met")
    lines = [titles, tuple("---" for _ in titles)]
    for row in rows:
        figures = (
            f"{row['ours']:.4g}",
            f"{row['best']:.4g}",
            row["it_is"],
            row["unit"],
            f"{row['ratio']:.2f}",
        )
        met = "yes" if row["ratio"] >= row["goal"] else "no"
        lines.append((row["part"], row["what"], *figures, f"{row['goal']:.2f}", met))
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    devices = sorted({f"{row['device']}, PyTorch {row['torch']}" for row in rows})
    (bench.out / "table.md").write_text("\n".join(devices) + f"\n\n{text}\n")
    print(text)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["what"] for row in rows], [row["ratio"] for row in rows])
    axes.plot([row["goal"] for row in rows], range(len(rows)), "k|", label="goal")
    axes.axvline(1, color="gray", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xlabel("times as good as the best other")
    axes.legend()
    figure.savefig(bench.out / "ratios.png")


MEASURED = (latency, large, streams, training, operators, former, bottleneck, attention)
ALL = (smoke, compile, *MEASURED, trace, report)
PARTS = {part.__name__: part for part in ALL}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a glance, to see that all of it runs")
    parser.add_argument(
        "--compile", default="", metavar="MODE", help="rivals compiled, too: max-autotune, ..."
    )
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    bench = Bench(given.out, given.device, given.quick, given.compile)
    for part in given.parts or PARTS:
        PARTS[part](bench)


if __name__ == "__main__":
    main(sys.argv[1:])

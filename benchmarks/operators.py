"""Times of the operators and modules beside PyTorch's, on one core, forward and with the backward pass.

    python benchmarks/operators.py FILE [--compile] [--dtype bfloat16] [--only WORDS] [--losses]
    python benchmarks/operators.py FILE --batches 1 --rounds 3 --what operators       # ten minutes
    python benchmarks/operator_table.py FILE

Operators: at the shapes of the families' networks and of other people's (`operator_shapes.py`), beside their
definition and other ways to write them (`operator_rivals.py`), with `--compile` those under torch.compile,
too. Modules: those of `mfkernels.nn` that a network is made of, with its inputs, beside themselves with the
operators' definitions and PyTorch's layers. All take turns: a ratio is the median of those of the rounds.
Where ours seems to be the slower it is measured again, three times as long, and that counts; `--losses` does
so with the losses of a FILE that is there.

A line of FILE is a case in JSON. Its floor is the larger of its operations over the core's peak and of a copy
of as many bytes as it must read and write; of a module that of the copy.
"""

import argparse
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from operator_rivals import RIVALS, Unfit
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import mfkernels
from mfkernels.bench.run import machine, peak_flops, pinned
from mfkernels.models import create_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cases import modules
from family_layers import fill, layers
from operator_shapes import elsewhere

NETWORKS = ("mobile_former_26m", "mobile_former_214m", "dmf_s", "iformer_m")
SECONDS = 0.004  # of a way in a round, or one call
Ways = dict[str, Callable[..., Any]]  # ours is the first


class Way:
    """One way to do something, and its times in seconds."""

    def __init__(self, function: Callable[..., Any], arguments: list, parameters: list, train: bool) -> None:
        copies = tree_map_only(Tensor, lambda a: copied(a).requires_grad_(train), arguments)
        self.function, self.arguments, self.train, self.times = function, copies, train, []
        self.inputs = [*(a for a in tree_leaves(copies) if isinstance(a, Tensor)), *parameters]
        self.grads = [torch.ones_like(o) for o in self.outputs()]
        self.calls = 1
        if self.once() < SECONDS:
            self.calls = max(1, int(SECONDS / self.once()))

    def outputs(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.train):
            return flat(self.function(*self.arguments))

    def run(self) -> None:
        pairs = zip(self.outputs(), self.grads, strict=True)
        if self.train:
            outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            torch.autograd.grad(outputs, self.inputs, grads, allow_unused=True)

    def once(self) -> float:
        """Seconds of the processor, so that others' work on the machine counts little."""
        start = time.process_time()
        for _ in range(self.calls):
            self.run()
        return (time.process_time() - start) / self.calls


def copied(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format)


def flat(out: Any) -> tuple[Tensor, ...]:
    return tuple(t for o in out for t in flat(o)) if isinstance(out, tuple | list) else (out,)


def measure(ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """Medians of the times, and of the ratios to ours, the first way's."""
    for way in ways.values():
        way.times.clear()
    for _ in range(rounds):
        for way in ways.values():
            way.run()  # its data into the caches
            way.times.append(way.once())
    ours, *_ = ways.values()
    ratios = {
        name: statistics.median(t / mine for t, mine in zip(way.times, ours.times, strict=True))
        for name, way in ways.items()
        if way is not ours
    }
    return dict(times={n: statistics.median(w.times) for n, w in ways.items()}, ratios=ratios)


def compared(ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    found = measure(ways, rounds)
    if min(found["ratios"].values()) < 1:
        found = measure(ways, 3 * rounds)
    return found


def agreeing(ways: dict[str, Way]) -> dict[str, Way]:
    """Return the ways that give the same numbers: another is none.

    In float32 all must, in narrower types the definition.
    """
    ours, *_ = ways.values()
    wide = ours.outputs()[0].dtype == torch.float32

    def agrees(name: str, way: Way) -> bool:
        for mine, theirs in zip(ours.outputs(), way.outputs(), strict=True):
            if (mine - theirs).abs().max() > (1e-3 if wide else 0.05) * theirs.abs().max():
                assert not wide and name != "definition", name
                return False
        return True

    return {name: way for name, way in ways.items() if agrees(name, way)}


_peak = functools.cache(peak_flops)


def floor(way: Way, definition: Way | None) -> float:
    """Seconds. Without a definition those of the copy."""
    operations = 0
    if definition is not None:
        with FlopCounterMode(display=False) as counter:
            definition.run()
        operations = counter.get_total_flops()
    size = sum(t.nbytes for t in (*way.inputs, *way.grads)) * (2 if way.train else 1)
    source = torch.zeros(max(1, size // 2), dtype=torch.uint8)
    copied, target = [], torch.zeros_like(source)
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        copied.append(time.perf_counter() - start)
    return max(min(copied), operations / _peak())


def operator_cases(dtype: torch.dtype, batches: list[int]) -> Iterator[tuple[dict, Callable]]:
    """Return the name of each case, and the function that makes its ways and their arguments."""
    generator = torch.Generator().manual_seed(0)
    for op in modules():
        for batch in batches:
            cases = [(layer, False) for layer in layers(batch, NETWORKS).get(op.NAME, [])]
            cases += [(layer, last) for name, layer, last in elsewhere(batch) if name == op.NAME]
            for layer, last in cases:
                case = dict(operator=op.NAME, batch=batch, case=_name(layer) + " channels last" * last)

                def make(op: Any = op, layer: tuple = layer, last: bool = last) -> tuple[Ways, list]:
                    arguments = [a.to(dtype) if isinstance(a, Tensor) else a for a in fill(layer, generator)]
                    if last:
                        arguments = [
                            a.contiguous(memory_format=torch.channels_last)
                            if isinstance(a, Tensor) and a.dim() == 4
                            else a
                            for a in arguments
                        ]
                    ways = dict(ours=op.OP, definition=op.REFERENCE)
                    ways |= {f.__name__: f for f in RIVALS.get(op.NAME, ())}
                    return ways, arguments

                yield case, make


def _name(layer: tuple) -> str:
    shapes = [v[1:] if isinstance(v, tuple) and v[:1] == ("tensor",) else v for v in layer]
    return " ".join("x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in shapes)


def module_cases(dtype: torch.dtype, batches: list[int]) -> Iterator[tuple[dict, Callable]]:
    """Return the name of each case, and the function that gives its module and inputs.

    The cases are public modules of the networks, each class once with each shape of its parameters and
    inputs.
    """
    public = tuple(t for n in mfkernels.nn.__all__ if isinstance(t := getattr(mfkernels.nn, n), type))
    for batch in (min(batch, 8) for batch in batches):
        for network in NETWORKS:
            model = create_model(network).to(dtype)
            found: dict[str, tuple[nn.Module, list]] = {}

            def note(module: nn.Module, inputs: tuple, found: dict = found) -> None:
                name = type(module).__name__ + " " + _shapes([*tree_leaves(inputs), *module.parameters()][:6])
                found.setdefault(name, (module, tree_map_only(Tensor, copied, list(inputs))))

            hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, public)]
            with torch.no_grad():
                model.eval()(torch.randn(batch, 3, 224, 224, dtype=dtype))
            for hook in hooks:
                hook.remove()
            for name, (module, inputs) in found.items():
                case = dict(operator=type(module).__name__, batch=batch, case=name.split(" ", 1)[1])
                yield case, lambda module=module, inputs=inputs: (module, inputs)


def _shapes(values: list) -> str:
    return " ".join("x".join(map(str, v.shape)) if isinstance(v, Tensor) else str(v) for v in values)


def by_definition(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with mfkernels.use_backend("reference"):
            return function(*arguments)

    return run


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dtype = options, getattr(torch, options.dtype)
        self.path = Path(options.file)
        self.before: dict[str, dict] = {}
        if options.losses:
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.before = {key(row): row for row in rows}
        self.rows: dict[str, dict] = dict(self.before)

    def wanted(self, case: dict) -> bool:
        if self.options.losses and min(self.before.get(key(case), {}).get("ratios", {"": 2}).values()) >= 1:
            return False
        name = key(case)
        return all(w in name for w in self.options.only) and not any(w in name for w in self.options.skip)

    def note(self, case: dict, ways: dict[str, Way], definition: Way | None) -> None:
        found = compared(ways, self.options.rounds)
        row = (
            case
            | machine()
            | dict(date=f"{datetime.date.today()}")
            | found
            | dict(floor=floor(ways["ours"], definition))
        )
        self.rows[key(case)] = row
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.rows.values()))
        name, ratio = min(found["ratios"].items(), key=lambda item: item[1])
        ours = 1e6 * found["times"]["ours"]
        print(f"{'LOSS ' if ratio < 1 else ''}{ratio:.2f} {ours:.0f} us {key(case)} ({name})", flush=True)

    def operators(self) -> None:
        for case, make in operator_cases(self.dtype, self.options.batches):
            for train in (False, True):
                this = case | dict(direction="training" if train else "forward", dtype=self.options.dtype)
                if not self.wanted(this):
                    continue
                functions, arguments = make()
                if self.options.compile:
                    torch.compiler.reset()
                    plain = [(n, f) for n, f in functions.items() if n != "ours"]
                    functions |= {f"{n}, compiled": torch.compile(f, dynamic=False) for n, f in plain}
                ways = {}
                for name, function in functions.items():
                    try:
                        ways[name] = Way(function, arguments, [], train)
                    except (Unfit, torch._dynamo.exc.TorchDynamoException):
                        continue  # not every way goes for every shape
                self.note(this, agreeing(ways), ways["definition"])

    def modules(self) -> None:
        for case, make in module_cases(self.dtype, self.options.batches):
            for train in (False, True):
                this = case | dict(direction="training" if train else "forward", dtype=self.options.dtype)
                if not self.wanted(this):
                    continue
                module, inputs = make()
                module.train(train)
                for norm in module.modules():
                    if case["batch"] == 1 and isinstance(norm, nn.BatchNorm1d | mfkernels.nn.KernelAttention):
                        norm.eval()  # it has one number to measure
                functions = {"ours": module, "definition": by_definition(module)}
                parameters = list(module.parameters())
                ways = {n: Way(f, inputs, parameters, train) for n, f in functions.items()}
                self.note(this, ways, None)


def key(case: dict) -> str:
    return " ".join(str(case[part]) for part in ("operator", "direction", "batch", "dtype", "case"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32], help="modules have at most 8")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the other ways, too")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name has these words")
    parser.add_argument("--skip", nargs="*", default=[], help="but none of these")
    parser.add_argument("--losses", action="store_true", help="those of FILE where ours was the slower")
    parser.add_argument("--what", default="operators,modules")
    options = parser.parse_args()
    with pinned(1):
        bench = Bench(options)
        for what in options.what.split(","):
            getattr(bench, what)()


if __name__ == "__main__":
    main()

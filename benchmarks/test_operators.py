"""Times of the operators at the shapes of the networks, on one core, forward and with the backward pass:

    python -m pytest benchmarks --networks mobile_former_214m,dmf_s,iformer_m --benchmark-json FILE
    python benchmarks/operator_table.py FILE

Beside them, in the same rounds and in turn: the definition, another way to write it (`operator_rivals.py`),
and both under torch.compile, which takes its time; `--eager` leaves that out. The floor of a shape is the
larger of its operations over the core's peak and of a copy of as many bytes as it must read and write.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from operator_rivals import RIVALS
from torch.utils.flop_counter import FlopCounterMode

from mfkernels.bench.run import peak_flops, pinned

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cases import modules
from family_layers import fill, layers

ROUNDS, SECONDS = 15, 0.01  # of every way, and the time of each in a round


def pytest_generate_tests(metafunc):
    networks = tuple(metafunc.config.getoption("--networks").split(","))
    cases = [
        pytest.param(op, layer, direction, id=f"{op.NAME} {direction} {_name(layer)}")
        for op in modules()
        for batch in (1, 32)
        for layer in layers(batch, networks).get(op.NAME, [])
        for direction in ("forward", "training")
    ]
    metafunc.parametrize(("op", "layer", "direction"), cases)


def _name(layer: tuple) -> str:
    shapes = [v[1:] if isinstance(v, tuple) and v[:1] == ("tensor",) else v for v in layer]
    return " ".join("x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in shapes)


class _Way:
    """One way to run the operator, and its times in seconds."""

    def __init__(self, function, arguments: list, train: bool) -> None:
        self.arguments = [
            a.clone().requires_grad_(train) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        self.function, self.train, self.times, self.calls = function, train, [], 1
        self.inputs = [a for a in self.arguments if isinstance(a, torch.Tensor)]
        out = self.outputs()
        self.grads = [torch.ones_like(o) for o in out]
        for _ in range(2):
            self()
        self.calls = max(1, int(SECONDS / self.once()))

    def outputs(self) -> tuple:
        out = self.function(*self.arguments)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, outputs: tuple) -> None:
        pairs = [pair for pair in zip(outputs, self.grads, strict=True) if pair[0].requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        torch.autograd.grad(outputs, self.inputs, grads)

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.train):
            for _ in range(self.calls):
                out = self.outputs()
                if self.train:
                    self.backward(out)

    def once(self) -> float:
        start = time.perf_counter()
        self()
        return (time.perf_counter() - start) / self.calls


@pytest.fixture(autouse=True)
def one_core():
    with pinned(1):
        yield


_peak = functools.cache(peak_flops)


def _floor(way: _Way, reference, size: int) -> float:
    """Seconds."""
    with torch.set_grad_enabled(way.train), FlopCounterMode(display=False) as counter:
        out = reference(*way.arguments)
        out = out if isinstance(out, tuple) else (out,)
        if way.train:
            torch.autograd.grad(out, way.inputs, way.grads)
    source = torch.zeros(max(1, size // 2))
    copied, target = [], torch.zeros_like(source)
    for _ in range(20):
        start = time.perf_counter()
        target.copy_(source)
        copied.append(time.perf_counter() - start)
    return max(min(copied), counter.get_total_flops() / _peak())


def test_operator(benchmark, request, op, layer, direction):
    train = direction == "training"
    arguments = fill(layer, torch.Generator().manual_seed(0))
    functions = {"eager": op.REFERENCE}
    if op.NAME in RIVALS:
        functions["rewritten"] = RIVALS[op.NAME]
    if not request.config.getoption("--eager"):
        torch.compiler.reset()
        functions |= {f"{name} compiled": torch.compile(f, dynamic=False) for name, f in functions.items()}
    ours = _Way(op.OP, arguments, train)
    rivals = {}
    for name, function in functions.items():
        try:
            rivals[name] = _Way(function, arguments, train)
        except (
            torch._dynamo.exc.TorchDynamoException
        ) as error:  # as of former_to_mobile_attention's definition
            benchmark.extra_info[f"{name} failed"] = str(error).splitlines()[0]
    for name, rival in rivals.items():
        for mine, theirs in zip(ours.outputs(), rival.outputs(), strict=True):
            assert (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max(), name

    def time_the_others() -> None:
        for rival in rivals.values():
            rival()  # its data into the caches
            rival.times.append(rival.once())
        ours()

    benchmark.pedantic(ours, setup=time_the_others, rounds=ROUNDS)
    values = sum(v.numel() for v in ours.inputs) + sum(g.numel() for g in ours.grads)
    extra = dict(operator=op.NAME, direction=direction, batch=ours.inputs[0].shape[0], layer=_name(layer))
    extra["floor"] = _floor(ours, op.REFERENCE, values * (2 if train else 1))
    extra["ours"] = statistics.median(benchmark.stats.stats.data) / ours.calls
    extra |= {name: statistics.median(rival.times) for name, rival in rivals.items()}
    benchmark.extra_info.update(extra)

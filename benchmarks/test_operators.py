"""Times of the operators: `python -m pytest benchmarks --benchmark-group-by=group` (needs pytest-benchmark).

Forward and backward on one thread, kernels beside the plain definition, at shapes of the networks. The
definitions and the samples are those of the tests.
"""

import sys
from pathlib import Path

import pytest
import torch

import mfkernels

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cases import modules

torch.set_num_threads(1)
CASES = [(op, shape) for op in modules() for shape in op.CHOSEN[:4]]


def _name(case) -> str:
    op, shape = case
    return f"{op.NAME} " + " ".join(f"{k}{v}" for k, v in shape.items())


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_operator(benchmark, case, memory_format, direction, backend):
    op, shape = case
    benchmark.group = f"{_name(case)}, {memory_format}, {direction}"
    train = direction != "forward"
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format

    def prepared(value: torch.Tensor) -> torch.Tensor:
        value = value.float()
        value = value.contiguous(memory_format=layout) if value.dim() == 4 else value
        return value.requires_grad_(train)

    sample = op.make(shape, torch.Generator().manual_seed(0)).map(prepared)

    def run() -> None:
        outputs = sample.call(op.OP)
        if train:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = [torch.ones_like(out) for out in outputs]
            torch.autograd.grad(outputs, list(sample.given().values()), grads)

    with mfkernels.use_backend(backend), torch.set_grad_enabled(train):
        benchmark(run)

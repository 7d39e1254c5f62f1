"""What the kernels need beyond inputs and results."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mfkernels
from mfkernels.operators.dynamic_relu.reference import dynamic_relu_reference


def _working_memory(function) -> int:
    """The most bytes that PyTorch's allocator had lent while `function` ran, less those of its results."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    lent = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        lent += event.nbytes()
        most = max(most, lent)
    return most - sum(result.nbytes for result in results)


@pytest.mark.parametrize("train", (False, True), ids=("inference", "training"))
def test_spatial_dynamic_relu_needs_a_tenth(train):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 96, 56, 56), (1, 6, 2, 96), (1, 6, 2, 96), (1, 6, 56, 56))
    inputs = [torch.rand(shape, generator=generator).requires_grad_(train) for shape in shapes]
    grad = torch.rand(shapes[0], generator=generator)

    def step(function):
        y = function(*inputs)
        return (y, *torch.autograd.grad(y, inputs, grad)) if train else (y,)

    reference = _working_memory(lambda: step(dynamic_relu_reference))
    assert reference > 4 * inputs[0].nbytes, "the coefficients of every pixel, and more"
    assert _working_memory(lambda: step(mfkernels.ops.dynamic_relu)) <= reference / 10

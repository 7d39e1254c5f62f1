"""Calls that other operators, PyTorch's or ours, do in the place of the kernels keep the one tolerance."""

import importlib

import pytest
import torch
from cases import modules
from test_contract import Comparison, channels_last, expect, same

import mfkernels

TRAINING = {
    "dynamic_conv2d": (
        dict(B=2, C=24, H=7, W=9, O=40, K=4, k=1, groups=1, stride=2, biases=True),
        dict(B=2, C=96, H=30, W=28, O=128, K=2, k=1, groups=1, stride=2, biases=True),
    ),
    "former_block": (dict(B=40, T=6, d=96, h=192, heads=4, form="standard"),),
    "pointwise_conv_bn": (
        dict(B=2, C=40, H=14, W=14, O=24, activation="gelu"),
        dict(B=3, C=9, H=7, W=5, O=20, activation="none"),
    ),
}
layout = pytest.mark.parametrize("layout", (same, channels_last), ids=lambda f: f.__name__)


@pytest.fixture
def calls(monkeypatch):
    """Inputs and results of the library, in the order of its calls."""
    found = []
    for name in TRAINING:
        runner = importlib.import_module(f"mfkernels.operators.{name}.operator")._run

        def spy(*arguments, library=runner._library):
            out = library(*arguments)
            found.append((arguments[0], out))
            return out

        monkeypatch.setattr(runner, "_library", spy)
    return found


def check(calls, count, layout):
    """The library was called so often, and keeps memory formats. For a 1x1 convolution with a stride it calls
    one without, which may be the library's again."""
    assert len(calls) in (count, 2 * count)
    for x, out in calls:
        assert layout is same or x.dim() != 4 or out.is_contiguous(memory_format=torch.channels_last)
    calls.clear()


@pytest.mark.parametrize("op", [op for op in modules() if op.NAME in TRAINING], ids=lambda op: op.NAME)
@layout
def test_with_gradients(op, layout, calls):
    for shape in TRAINING[op.NAME]:
        comparison = Comparison(op, torch.float32, backend="auto")
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            comparison.add(expect(op, op.make(shape, generator), generator, torch.float32), layout)
        comparison.check(f"{shape}")
        check(calls, 4, layout)


def test_deep_products_where_registers_are_few(monkeypatch):
    """The choice by the processor, made for each of them."""
    x, weight = torch.randn(2, 300, 6, 5), torch.randn(8, 300, 1, 1)
    arguments = x, weight, torch.randn(3, *weight.shape), torch.rand(2, 3)
    with mfkernels.use_backend("reference"):
        expected = mfkernels.ops.dynamic_conv2d(*arguments)
    for name in ("avx2", "avx512"):
        monkeypatch.setattr(mfkernels.native, "instruction_set", lambda name=name: name)
        ours = mfkernels.ops.dynamic_conv2d(*arguments)
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()

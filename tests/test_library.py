"""Calls that PyTorch's own operators do in the place of the kernels give the same numbers.

They round as PyTorch does: its convolution adds up longer chains than the definition. So of dynamic_conv2d
the tolerance's reference is the less exact of two, the definition and the same convolution in plain PyTorch.
"""

import importlib

import pytest
import torch
from cases import modules
from test_contract import Comparison, channels_last, expect, run, same
from torch.nn import functional as F

import mfkernels

CALLS = {
    "dynamic_conv2d": (
        dict(B=1, C=32, H=28, W=28, O=24, K=4, k=3, groups=1, padding=1, biases=True),
        dict(B=5, C=32, H=29, W=27, O=32, K=3, k=3, groups=2, padding=1, stride=2, biases=True),
        dict(B=2, C=16, H=40, W=30, O=40, K=2, k=(5, 3), groups=1, padding=(2, 1)),
        dict(B=2, C=24, H=7, W=9, O=40, K=4, k=1, groups=1, stride=2, biases=True),
        dict(B=3, C=24, H=40, W=36, O=24, K=4, k=5, groups=24, padding=2, stride=2),
    ),
    "former_block": (dict(B=40, T=6, d=96, h=192, heads=4, form="standard"),),
    "pointwise_conv_bn": (
        dict(B=2, C=40, H=14, W=14, O=24, activation="gelu"),
        dict(B=3, C=9, H=7, W=5, O=20, activation="none"),
    ),
}


def convolve(x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, basis_scale):
    """The samples are groups."""
    mixed = weight + basis_scale * torch.einsum("bk,koihw->boihw", attention, basis)
    samples = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(samples, mixed.flatten(0, 1), None, stride, padding, dilation, groups * x.shape[0])
    y = y.reshape(x.shape[0], -1, *y.shape[2:])
    return y if bias is None else y + (bias + attention @ basis_bias)[..., None, None]


@pytest.mark.parametrize("op", [op for op in modules() if op.NAME in CALLS], ids=lambda op: op.NAME)
@pytest.mark.parametrize("layout", (same, channels_last), ids=lambda f: f.__name__)
def test_library(op, layout, monkeypatch):
    runner = importlib.import_module(f"mfkernels.operators.{op.NAME}.operator")._run
    calls = []

    def spy(*arguments, library=runner._library):
        out = library(*arguments)
        calls.append((arguments[0], out))
        return out

    monkeypatch.setattr(runner, "_library", spy)
    for shape in CALLS[op.NAME]:
        comparison = Comparison(op, torch.float32, backend="auto")
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            expected = expect(op, op.make(shape, generator), generator, torch.float32)
            comparison.add(expected, layout)
            if op.NAME == "dynamic_conv2d":
                sample = expected.sample.map(torch.Tensor.float)
                for name, value in run(op, sample, convolve, expected.cotangents).items():
                    comparison.errors[name].reference(value, expected.truth[name])
        comparison.check(f"{shape}")
        assert len(calls) == 4, shape
        for x, out in calls:
            assert layout is same or x.dim() != 4 or out.is_contiguous(memory_format=torch.channels_last)
        calls.clear()


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

"""1x1 convolutions and depthwise ones with large kernels: by our kernels in training, as PyTorch's."""

import copy

import pytest
import torch
from torch import nn

import mfkernels
from mfkernels.nn import convolution
from mfkernels.nn.convolution import convolve


def layer(size: int = 7, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    groups = 1 if size == 1 else 6
    return nn.Conv2d(6, 6, size, **dict(padding=size // 2, groups=groups, bias=False) | options)


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(convolution, "SMALL", 0)
    real = mfkernels.ops.dynamic_conv2d
    monkeypatch.setattr(mfkernels.ops, "dynamic_conv2d", lambda *a, **k: found.append(1) or real(*a, **k))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 5, 7])
def test_same_as_the_layer(calls, size, bias, dtype):
    plain = layer(size, bias=bias).to(dtype)
    fast = copy.deepcopy(plain)
    x = torch.randn(3, 6, 9, 18, dtype=dtype)
    results = []
    for conv, run in ((plain, plain), (fast, lambda v: convolve(fast, v))):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(torch.cos(x))
        results.append([y, leaf.grad, *(p.grad for p in conv.parameters())])
    assert len(calls) == 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.detach().abs().max()))


OTHERS = {
    "small": dict(size=3),
    "stride": dict(stride=2),
    "dilation": dict(dilation=2, padding=6),
    "padding": dict(padding=2),
    "reflecting": dict(padding_mode="reflect"),
    "grouped": dict(groups=3),
    "pointwise, stride": dict(size=1, stride=2),
    "pointwise, padding": dict(size=1, padding=1),
    "pointwise, grouped": dict(size=1, groups=2),
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_layers_are_called(calls, options):
    conv, x = layer(**options), torch.randn(2, 6, 9, 8)
    assert torch.equal(convolve(conv, x), conv(x))
    assert not calls


def test_only_in_training(calls):
    conv, x = layer(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        convolve(conv, x)
    conv.requires_grad_(False)
    convolve(conv, x.requires_grad_())
    conv.requires_grad_(True)
    with mfkernels.use_backend("reference"):
        convolve(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(conv, x).dtype == torch.bfloat16
    hook = conv.register_forward_hook(lambda *_: None)
    convolve(conv, x)
    assert not calls
    hook.remove()
    convolve(conv, x)
    assert calls


def test_small_ones_train_by_the_layer(calls, monkeypatch):
    monkeypatch.setattr(convolution, "SMALL", 6 * 6 * 50)
    conv = layer(1)
    convolve(conv, torch.randn(1, 6, 7, 7))
    assert not calls
    convolve(conv, torch.randn(1, 6, 5, 10))
    assert calls

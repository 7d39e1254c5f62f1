"""`nn.normalize` and `nn.FusedSequential` do what the layers do, and leave to them what is not theirs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mfkernels
from mfkernels.nn import ConvBN, FusedSequential, normalize


@pytest.fixture(autouse=True)
def on_small_maps():
    with mfkernels.use_backend("cpu"):
        yield


def make_norm(**options) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6, **options)
    generator = torch.Generator().manual_seed(0)
    for value in (*norm.parameters(), norm.running_mean, norm.running_var):
        if value is not None:
            value.data.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return norm


def images(*shape: int) -> torch.Tensor:
    return 3 + 2 * torch.randn(shape or (3, 6, 5, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(momentum=0.3, eps=1e-2),
        dict(momentum=None),
        dict(affine=False),
        dict(track_running_stats=False),
    ],
    ids=str,
)
def test_same_as_the_layer(options, activation):
    """Results, gradients and the state after three steps, and then in eval mode."""
    plain = make_norm(**options)
    fast = copy.deepcopy(plain)
    for training in (True, True, True, False):
        results = []
        for norm in (plain, fast):
            norm.train(training).zero_grad()
            x = images().requires_grad_()
            if norm is fast:
                y = normalize(norm, x, activation)
            else:
                y = F.gelu(norm(x)) if activation == "gelu" else norm(x)
            y.backward(images().flip(0))
            results.append([y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_frozen_layers_train_their_parameters():
    norm = make_norm().eval()
    before = norm.running_mean.clone()
    normalize(norm, images(), "gelu").sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 0


def test_autocast_leaves_dtypes_as_the_layer_does():
    """Half precision in and out, parameters and statistics in float32."""
    plain = make_norm()
    fast = copy.deepcopy(plain)
    x = images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(x), normalize(fast, x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert fast.running_var.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(fast.running_var, plain.running_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(place):
    seen = []
    layers = FusedSequential(nn.Conv2d(3, 6, 1), make_norm(), nn.GELU(), nn.Conv2d(6, 2, 1))
    expected = layers(images(2, 3, 4, 5))
    for index in (1, 2):
        getattr(layers[index], place)(lambda module, *_: seen.append(type(module)))
    torch.testing.assert_close(layers(images(2, 3, 4, 5)), expected)
    assert seen == [nn.BatchNorm2d, nn.GELU]


def test_other_norms_are_called():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    norm = Doubled(6).eval()
    torch.testing.assert_close(normalize(norm, images()), 2 * images(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalize(nn.Identity(), images(), "gelu"), F.gelu(images()))


def test_one_number_a_channel_cannot_be_measured():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        normalize(make_norm(), images(1, 6, 1, 1))


def test_small_maps_train_by_the_layer(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: calls.append(x.numel()) or x)
    with mfkernels.use_backend("auto"):
        for size in (40, 150):
            normalize(make_norm(), images(1, 6, size, size))
            normalize(make_norm(), images(1, 6, size, size), "gelu")
    assert calls == [9600, 9600]


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be 'none' or 'gelu', got 'relu'"):
        normalize(make_norm().eval(), images(), "relu")
    with pytest.raises(ValueError, match="activation must be 'none' or 'gelu', got 'relu'"):
        normalize(make_norm(), images(), "relu")


def test_maps_far_from_zero():
    """What rounding a large mean leaves off is not lost: it would be a hundred times this error."""
    x = 3000 + torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    weight, bias = torch.ones(6), torch.zeros(6)
    with mfkernels.use_backend("cpu"):
        y, _, variance = mfkernels.ops.batch_norm(x, weight, bias)
    with mfkernels.use_backend("reference"):
        truth, _, exact = mfkernels.ops.batch_norm(x.double(), weight.double(), bias.double())
    assert (y - truth).abs().max() < 1e-6
    assert (variance - exact).abs().max() < 1e-6


@pytest.mark.parametrize("train", [True, False])
def test_sequential(train):
    """Each GELU once: after a norm, after a convolution with one, after another GELU; and one by tanh."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        ConvBN(3, 6), nn.GELU(), nn.GELU(), nn.Conv2d(6, 6, 3), make_norm(), nn.GELU("tanh"), ConvBN(6, 2)
    ).train(train)
    fast = FusedSequential(*copy.deepcopy(plain)).train(train)
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    assert list(fast.state_dict()) == list(plain.state_dict())
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


def test_kernels_run_where_they_should(monkeypatch):
    """In train mode, and before a GELU; not where the definitions are asked for."""
    calls = []
    real = mfkernels.ops.batch_norm
    monkeypatch.setattr(mfkernels.ops, "batch_norm", lambda *a, **k: calls.append(1) or real(*a, **k))
    norm = make_norm()
    normalize(norm, images())
    normalize(norm.eval(), images(), "gelu")
    assert len(calls) == 2
    normalize(norm, images())
    with mfkernels.use_backend("reference"):
        normalize(norm.train(), images(), "gelu")
    assert len(calls) == 2


def test_exported_without_our_operators_it_is_a_batch_norm():
    layers = FusedSequential(nn.Conv2d(3, 6, 1), make_norm(), nn.GELU()).eval()
    program = torch.export.export(layers, (images(2, 3, 4, 5),))
    plain = program.run_decompositions(mfkernels.decompositions())
    names = [str(node.target) for node in plain.graph.nodes]
    assert not any("mfkernels" in name for name in names)
    assert any("batch_norm" in name for name in names)
    torch.testing.assert_close(plain.module()(images(2, 3, 4, 5)), layers(images(2, 3, 4, 5)))

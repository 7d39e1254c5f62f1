"""`nn.conv_norm` and the modules made of it do what the layers do, in one kernel where they can."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mfkernels
from mfkernels.nn import ConvBN, FusedSequential, conv_norm


def layers(channels: int = 5, outputs: int = 6, **options) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, norm = (
        nn.Conv2d(channels, outputs, **dict(kernel_size=1, bias=False) | options),
        nn.BatchNorm2d(outputs),
    )
    for value in (*norm.parameters(), norm.running_mean, norm.running_var):
        value.data.copy_(torch.rand(value.shape) + 0.5)
    return conv, norm.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (3, 5, 7, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    found = []
    real = mfkernels.ops.pointwise_conv_bn
    monkeypatch.setattr(mfkernels.ops, "pointwise_conv_bn", lambda *a: found.append(a[-1]) or real(*a))
    return found


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_as_the_layers(calls, dtype, activation):
    conv, norm = layers()
    conv, norm, x = conv.to(dtype), norm.to(dtype), images().to(dtype)
    expected = F.gelu(norm(conv(x))) if activation == "gelu" else norm(conv(x))
    with torch.no_grad():
        torch.testing.assert_close(conv_norm(conv, norm, x, activation), expected.detach())
    assert calls == [activation]


def test_modules_of_it(calls):
    sequence = FusedSequential(*layers(), nn.GELU(), *layers(6, 4), nn.ReLU(), ConvBN(4, 3), nn.GELU()).eval()
    plain = nn.Sequential(*sequence[:6], nn.Sequential(sequence[6].c, sequence[6].bn), nn.GELU()).eval()
    with torch.inference_mode():
        torch.testing.assert_close(sequence(images()), plain(images()))
    assert calls == ["gelu", "none", "gelu"]


OTHERS = {
    "3x3": dict(kernel_size=3),
    "stride": dict(stride=2),
    "padding": dict(padding=1),
    "bias": dict(bias=True),
    "grouped": dict(channels=6, groups=3),
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_other_convolutions_are_called(calls, options):
    conv, norm = layers(**options)
    x = images(2, conv.in_channels, 6, 5)
    torch.testing.assert_close(conv_norm(conv, norm, x), norm(conv(x)))
    assert not calls


def test_where_the_layers_are_called(calls):
    """In training, in half precision, of other norms, with hooks, as somebody else's backend, compiled."""
    conv, norm = layers()
    x = images()
    conv_norm(conv, norm, x).sum().backward()
    assert conv.weight.grad is not None and norm.weight.grad is not None
    with torch.no_grad():
        conv_norm(conv, copy.deepcopy(norm).train(), x)
        conv_norm(conv, nn.Identity(), x)
        conv_norm(conv, norm, x.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            assert conv_norm(conv, norm, x).dtype == torch.bfloat16
        with mfkernels.use_backend("reference"):
            conv_norm(conv, norm, x)
        for layer in (conv, norm):
            seen = []
            hook = layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            conv_norm(conv, norm, x)
            hook.remove()
            assert seen
        assert not calls
        conv_norm(conv, norm, x)
        assert calls


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [dict(), dict(kernel_size=7, padding=3, groups=6)], ids=["1x1", "7x7"])
def test_exported_as_the_layers(options, grad):
    """For any batch."""
    batch = torch.export.Dim("batch", max=64)
    x = torch.randn(2, 6, 9, 9)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(ConvBN(6, 6, **options).eval(), (x,), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in names and not any("mfkernels" in name for name in names)


def test_unknown_activation():
    with torch.no_grad(), pytest.raises(ValueError, match="activation must be 'none' or 'gelu', got 'relu'"):
        conv_norm(*layers(), images(), "relu")

"""The mask of the attention from pixels to tokens, beyond what the contract's samples with a mask promise."""

import importlib.util

import numpy as np
import pytest
import torch
from cases.mobile_to_former_attention import MASKS, make_mask
from test_contract import DTYPES, channels_last, reversed_axes, same
from torch import Tensor

import mfkernels
from mfkernels.nn import Padding
from mfkernels.operators.dispatch import triton_interpreted
from mfkernels.ops import mobile_to_former_attention

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not triton_interpreted(),
    reason="needs Triton, and its interpreter",
)
kinds = pytest.mark.parametrize("kind", MASKS)
BAD = (float("nan"), float("inf"), 1e30)
SHAPE, SMALL = (2, 12, 40, 37), (2, 12, 9, 11)  # of several tiles on a CPU, and on a GPU


def arguments(dtype: torch.dtype = torch.float32, shape=SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x, torch.randn(shape[0], 3, shape[1], generator=generator).to(dtype)


def results(x: Tensor, q: Tensor, mask: Tensor | None, logits: bool = True, given=None) -> list[Tensor]:
    """Result, logits if asked for, gradients; `given` is the logits' gradient, or one of ones."""
    x, q = (t.detach().requires_grad_() for t in (x, q))
    outputs = mobile_to_former_attention(x, q, 2, None, logits, mask)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(outputs[0].shape, generator=generator).to(x.dtype)]
    if logits:
        grads.append(torch.ones_like(outputs[1]) if given is None else given.to(x.dtype))
    gradients = torch.autograd.grad(outputs, [x, q], grads)
    return [t.detach() for t in (*outputs, *gradients)]


def hides(kind: str, bad: float, x: Tensor, q: Tensor, layout=same) -> None:
    """What masked pixels hold, and the gradient of their logits, change no bit of a result."""
    mask = make_mask(kind, x.shape[0], *x.shape[2:], torch.Generator().manual_seed(2))
    given = torch.randn(2, 2, 3, *x.shape[2:], generator=torch.Generator().manual_seed(3))
    outside = mask[:, None, None]
    expected, got = (
        results(layout(x.masked_fill(mask[:, None], fill)), q, mask, given=given.masked_fill(outside, fill))
        for fill in (0.0, bad)
    )
    for value, other in zip(got, expected, strict=True):
        assert torch.equal(value, other)
    _, logits, grad_x, _ = got
    assert not logits.masked_select(outside).any()
    assert not grad_x.masked_select(mask[:, None]).any()


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_masked_pixels_hold_reaches_nothing(kind, dtype, instruction_set):
    with mfkernels.use_backend("cpu"):
        for bad in BAD:
            for layout in (same, channels_last):
                hides(kind, bad, *arguments(dtype), layout)


@interpreted
@kinds
def test_what_masked_pixels_hold_reaches_nothing_in_triton(kind):
    with mfkernels.use_backend("triton"):
        for bad in BAD:
            hides(kind, bad, *arguments(torch.float32, SMALL))
        hides(kind, torch.nan, *arguments(torch.bfloat16, SMALL), channels_last)


def of_nothing(shape: tuple[int, ...]) -> None:
    """A mask that hides nothing changes no bit."""
    x, q = arguments(shape=shape)
    for logits in (False, True):
        expected = results(x, q, None, logits)
        got = results(x, q, torch.zeros(2, *shape[2:]) > 0, logits)
        for value, other in zip(got, expected, strict=True):
            assert torch.equal(value, other)


def of_a_sample(shape: tuple[int, ...]) -> None:
    """A sample without pixels gets zeros, the other what it gets alone, and no NaN is made on the way."""
    x, q = arguments(shape=shape)
    mask = torch.zeros(2, *shape[2:]) > 0
    mask[1] = True
    with torch.autograd.detect_anomaly(check_nan=True):
        together = results(x, q, mask)
    for value in together:
        assert not value[1].any() and value[0].any()
    assert torch.equal(together[0][:1], mobile_to_former_attention(x[:1], q[:1], 2))


def of_minus_infinity(shape: tuple[int, ...]) -> None:
    """Where all logits that are left are -inf, their softmax is NaN, as without a mask."""
    x, q = -torch.ones(shape), torch.full((2, 3, shape[1]), torch.inf)
    mask = torch.zeros(2, *shape[2:]) > 0
    mask[:, 2:] = True
    with np.errstate(all="ignore"):  # of the interpreter
        for hidden in (None, mask):
            assert mobile_to_former_attention(x, q, 2, mask=hidden).isnan().all()


special = pytest.mark.parametrize("check", [of_nothing, of_a_sample, of_minus_infinity])


@special
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_special_masks(check, instruction_set):
    with mfkernels.use_backend("cpu"):
        check(SHAPE)


@special
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_special_masks_elsewhere(check, backend):
    with mfkernels.use_backend(backend):
        check(SMALL)


def test_padded_is_like_cut_out(instruction_set):
    x, q = arguments(shape=(2, 12, 21, 30))
    mask = torch.ones(2, 21, 30) > 0
    mask[0, :13, :8] = mask[1, :2, :30] = False
    with mfkernels.use_backend("cpu"):
        out, logits, grad_x, _ = results(x, q, mask)
        for i, (height, width) in enumerate(((13, 8), (2, 30))):
            part = x[i : i + 1, :, :height, :width]
            alone = mobile_to_former_attention(part, q[i : i + 1], 2, return_logits=True)
            torch.testing.assert_close(out[i : i + 1], alone[0])
            torch.testing.assert_close(logits[i : i + 1, :, :, :height, :width], alone[1])
    assert grad_x[0, :, :13, :8].all()


@kinds
def test_masks_of_any_strides(kind, instruction_set):
    x, q = arguments()
    mask = make_mask(kind, x.shape[0], *x.shape[2:], torch.Generator().manual_seed(2))
    with mfkernels.use_backend("cpu"):
        expected = results(x, q, mask)
        for other in (reversed_axes(mask), mask.repeat_interleave(2, 2)[:, :, ::2]):
            assert not other.is_contiguous()
            for value, result in zip(results(x, q, other), expected, strict=True):
                assert torch.equal(value, result)
        same_for_all = results(x, q, mask[:1].expand(2, -1, -1))
        for value, result in zip(same_for_all, results(x, q, mask[:1].repeat(2, 1, 1)), strict=True):
            assert torch.equal(value, result)


def test_compiled_and_exported():
    x, q = arguments()
    mask = make_mask("padding", x.shape[0], *x.shape[2:], torch.Generator().manual_seed(2))

    class Attend(torch.nn.Module):
        def forward(self, x, q, mask):
            return mobile_to_former_attention(x, q, 2, None, True, mask)

    with mfkernels.use_backend("cpu"):
        expected = Attend()(x, q, mask)
        compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
        program = torch.export.export(Attend(), (x, q, mask))
        plain = program.run_decompositions(mfkernels.decompositions())
        assert not any("mfkernels" in str(node.target) for node in plain.graph.nodes)
        for values in (compiled(x, q, mask), program.module()(x, q, mask)):
            for value, other in zip(values, expected, strict=True):
                assert torch.equal(value, other)
        torch.testing.assert_close(plain.module()(x, q, mask), expected)


@pytest.mark.parametrize("return_logits", [False, True])
def test_the_module_hides_padding(return_logits):
    """By our operator, and as PyTorch's own do it."""
    torch.manual_seed(0)
    part = mfkernels.nn.MobileToFormer(12, 16)
    x, tokens = torch.randn(SHAPE), torch.randn(3, 2, 16)
    padding = Padding(make_mask("padding", 2, 40, 37, torch.Generator().manual_seed(2)))
    inside = padding.inside(x)
    got, logits = part(x, tokens, return_logits, padding=padding)
    with mfkernels.use_backend("reference"):
        expected, _ = part(x, tokens, padding=padding)
    torch.testing.assert_close(got, expected)
    assert (logits is None) == (not return_logits)
    if logits is not None:
        _, everywhere = part(x, tokens)
        torch.testing.assert_close(logits, everywhere.masked_fill(~inside[:, None], 0.0))

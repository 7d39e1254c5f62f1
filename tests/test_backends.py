import re

import pytest
import torch
from cases import modules
from family_layers import Recorder
from test_contract import Comparison, expect, reversed_axes, same

import mfkernels
from mfkernels import current_backend, native, ops, use_backend

# Why the backend "cuda" does not take tensors on the CPU.
NO_CUDA = native.CUDA_LACKS or "runs on CUDA tensors, got device cpu"


def test_nesting_and_exceptions():
    assert current_backend() == "auto"
    with use_backend("reference"):
        assert current_backend() == "reference"
        with pytest.raises(KeyError), use_backend("cpu"):
            assert current_backend() == "cpu"
            raise KeyError
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_a_backend_that_cannot_run_lists_every_reason():
    x, slopes = torch.ones(1, 4, 2, 2, dtype=torch.float64), torch.ones(1, 2, 4, dtype=torch.float64)
    with use_backend("cuda"), pytest.raises(RuntimeError) as error:
        ops.dynamic_relu(x, slopes)
    for part in ("dynamic_relu", "reference: can run", "cpu: can run", "triton: runs ", f"cuda: {NO_CUDA}"):
        assert part in str(error.value)


def test_dtypes_without_kernels_run_the_reference():
    x, slopes = torch.randn(1, 4, 2, 2).half(), torch.randn(1, 2, 4).half()
    with use_backend("reference"):
        expected = ops.dynamic_relu(x, slopes)
    assert torch.equal(ops.dynamic_relu(x, slopes), expected)
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"float32, float64 and bfloat16, got torch\.float16"),
    ):
        ops.dynamic_relu(x, slopes)


def test_the_choice_is_seen():
    """Which code runs, not only what it returns."""
    x, slopes = torch.randn(1, 4, 2, 2), torch.randn(1, 2, 4)
    for name, kernels in (("reference", False), ("cpu", True), ("auto", True)):
        with use_backend(name), Recorder() as recorder:
            ops.dynamic_relu(x, slopes)
        assert ("dynamic_relu" in recorder.layers) == kernels, name


def test_compiled_code_follows_the_choice():
    x, slopes = torch.randn(1, 4, 2, 2), torch.randn(1, 2, 4)
    compiled = torch.compile(lambda: ops.dynamic_relu(x, slopes), backend="eager", fullgraph=True)
    compiled()
    with use_backend("cuda"), pytest.raises(Exception, match=re.escape(f"cuda: {NO_CUDA}")):
        compiled()


def test_gradients_of_gradients_on_the_reference():
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    q = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x, q: ops.mobile_to_former_attention(x, q, 1), (x, q))


def test_autocast_takes_mixed_dtypes():
    """Under autocast the queries come in bfloat16, and the map perhaps in float32."""
    block = mfkernels.nn.MobileFormerBlock(8, 8, expansion=2, token_dim=16, token_num=3)
    x, tokens = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(3, 2, 16)
    expected, _ = block(x, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = block(x, tokens)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_leaves_maps_as_they_are():
    """Coefficients in float32 do not widen a map in bfloat16; the other way round they are widened."""
    x, slopes = torch.randn(2, 8, 6, 6), torch.randn(2, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = ops.dynamic_relu(x.bfloat16(), slopes)
        wide = ops.dynamic_relu(x, slopes.bfloat16())
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(narrow, ops.dynamic_relu(x.bfloat16(), slopes.bfloat16()))
    with pytest.raises(TypeError, match="slopes must have the dtype of x"):
        ops.dynamic_relu(x.bfloat16(), slopes)


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_96", "iformer_t"])
def test_autocast_trains_on_narrow_maps(name):
    """Under autocast no convolution of a network is given a map in float32 but the images.

    A mean over the pixels, of which dynamic kernels are made, is no map.
    """
    model = mfkernels.models.create_model(name)
    wide = []

    def note(module, inputs):
        if inputs[0].dtype == torch.float32 and inputs[0].shape[2:] != (1, 1):
            wide.append(module.in_channels)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 64, 64))
    assert wide == [3]


def test_set_instruction_set():
    before = native.instruction_set()
    for name in native.supported_instruction_sets():
        native.set_instruction_set(name)
        assert native.instruction_set() == name
    native.set_instruction_set(before)
    with pytest.raises(ValueError, match=f"must be one of {', '.join(native.ISAS)}, got 'sse9'"):
        native.set_instruction_set("sse9")
    assert native.instruction_set() == before


def test_an_instruction_set_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(native._C, "supports", lambda name: name == "generic")
    with pytest.raises(
        RuntimeError, match="'avx512' cannot run here; this machine and build can run: generic"
    ):
        native.set_instruction_set("avx512")


LARGE = [
    dict(B=9, T=6, d=192, h=128, heads=4),
    dict(B=9, T=6, d=192, h=0, heads=4),
    dict(B=9, T=6, d=192, h=128, heads=4, form="standard"),
]


@pytest.mark.parametrize("layout", [same, reversed_axes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_the_library(dtype, layout):
    """What PyTorch's own products do by default: outputs and gradients."""
    op = next(op for op in modules() if op.NAME == "former_block")
    for shape in LARGE:
        generator, comparison = torch.Generator().manual_seed(0), Comparison(op, dtype, "auto")
        for _ in range(4):
            sample = op.make(shape, generator)
            comparison.add(expect(op, sample, generator, dtype), layout)
        comparison.check(f"{shape}")
        sample = sample.map(lambda v: layout(v.to(dtype)).requires_grad_())
        with Recorder() as recorder:
            sample.call(op.OP)
        assert op.NAME not in recorder.layers

"""The Triton kernels. Without a GPU they run interpreted, on small shapes, and are compiled for GPUs that are
not there; with one, the tests marked gpu run them as they are."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import modules
from test_contract import LAYOUTS, Comparison, cotangents_of, expanded, expect, run

import mfkernels
from mfkernels.operators.dispatch import triton_interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
OPERATORS = modules()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLES = 10

operator = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.NAME)
interpreted = pytest.mark.skipif(
    not triton_interpreted(), reason="kernels run on the GPU here, not interpreted"
)


@interpreted
@operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted(op, dtype):
    comparison = Comparison(op, dtype, "triton")
    for seed in range(SAMPLES):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        sample = op.make(op.random_shape(rng), generator)
        layout, grad_layout = rng.choice(LAYOUTS), rng.choice((*LAYOUTS, expanded))
        comparison.add(expect(op, sample, generator, dtype, grad_layout), layout, grad_layout)
    comparison.check("interpreted")


@interpreted
@operator
def test_interpreted_edges(op):
    """The chosen shapes that are small."""
    for shape in op.CHOSEN:
        generator = torch.Generator().manual_seed(0)
        sample = op.make(shape, generator)
        largest = max(v.numel() for v in sample.given().values())
        if largest > 4000:
            continue
        comparison = Comparison(op, torch.float32, "triton")
        # The fewer numbers, the more samples it takes to see how exact the reference is.
        for _ in range(24 if largest < 20 else 32 if largest < 1000 else 2):
            comparison.add(expect(op, op.make(shape, generator), generator, torch.float32))
        comparison.check(f"{shape}")


@interpreted
@operator
def test_interpreted_integers_are_exact(op):
    generator = torch.Generator().manual_seed(0)
    for sample in op.make_exact(generator):
        cotangents = {k: v.mul(2).round() for k, v in cotangents_of(op, sample, generator).items()}
        truth = run(op, sample, op.REFERENCE, cotangents)
        with mfkernels.use_backend("triton"):
            ours = run(op, sample.map(lambda v: v.float()), op.OP, cotangents)
        for name, value in ours.items():
            assert torch.equal(value, truth[name].float()), name


@interpreted
def test_the_cpu_kernels_are_back_afterwards():
    x, slopes = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    with mfkernels.use_backend("triton"), pytest.raises(RuntimeError, match=r"float16, got torch\.float64"):
        mfkernels.ops.dynamic_relu(x, slopes)
    with mfkernels.use_backend("triton"):
        mfkernels.ops.dynamic_relu(x.float(), slopes.float())
    with mfkernels.use_backend("cpu"):  # in float64, which Triton kernels do not take
        assert mfkernels.ops.dynamic_relu(x, slopes).dtype == torch.float64


def test_kernels_compile_and_fit(tmp_path):
    """All that the networks' layers launch in bfloat16 for sm_90; for other targets and dtypes a part of it,
    as the script says."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    deployed = {"activated_conv", "activated_depthwise", "kernel_scores", "pointwise", "token_steps"}
    assert {r["operator"] for r in results} == deployed | {op.NAME for op in OPERATORS}
    assert {r["target"] for r in results} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(r["registers"] > 0 and "shared" in r for r in results)


def test_fits():
    """A kernel that spills, or needs more than there is, is not let pass: the script fails."""
    result = dict(target="sm_80", registers=128, spills=0, local=0, shared=163 << 10)
    result["constants"] = {"num_warps": 16}
    import triton_compile  # imports Triton

    assert triton_compile.fits(result)
    for name, value in dict(registers=129, spills=4, local=16, shared=(163 << 10) + 1).items():
        assert not triton_compile.fits(result | {name: value}), name
    assert triton_compile.fits(result | {"target": "sm_90", "shared": 227 << 10})
    assert not triton_compile.fits(result | {"target": "gfx942", "shared": 163 << 10})


@pytest.mark.gpu
@operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_on_a_gpu(op, dtype, layout):
    for shape in op.CHOSEN:
        comparison = Comparison(op, dtype, "triton", "cuda")
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            comparison.add(expect(op, op.make(shape, generator), generator, dtype), layout)
        comparison.check(f"{shape}")


@pytest.mark.gpu
@operator
def test_graphs_streams_and_devices(op):
    """The same bits in a CUDA graph, on another stream and on another device."""
    sample = op.make(op.CHOSEN[0], torch.Generator().manual_seed(0)).map(lambda v: v.float().cuda())
    with torch.no_grad():
        expected = _first(sample.call(op.OP))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            assert torch.equal(_first(sample.call(op.OP)), expected)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _first(sample.call(op.OP))
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
        if torch.cuda.device_count() > 1:
            other = sample.map(lambda v: v.to("cuda:1"))
            assert torch.equal(_first(other.call(op.OP)).cpu(), expected.cpu())


def _first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs

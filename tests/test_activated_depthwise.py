"""The Triton kernel of deployed Mobile-Formers: interpreted, and with a GPU as it is."""

import importlib.util

import pytest
import torch
from cases import integers, normal
from test_contract import LAYOUTS
from tolerance import Errors

from mfkernels.deploy.gpu.activated_depthwise import activated_depthwise_reference
from mfkernels.operators.dispatch import triton_interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(
    not triton_interpreted(), reason="kernels run on the GPU here, not interpreted"
)
SHAPES = [
    dict(B=2, C=12, E=12, H=9, W=13, activated=True),
    dict(B=1, C=6, E=18, H=7, W=7, activated=False),
    dict(B=1, C=70, E=140, H=3, W=5, activated=True),
    dict(B=3, C=5, E=5, H=1, W=70, activated=True),
    dict(B=1, C=1, E=1, H=1, W=1, activated=False),
    dict(B=0, C=4, E=4, H=3, W=3, activated=True),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(shape: dict, generator: torch.Generator, draw=normal) -> list:
    """Arguments; `before` is None where the map is not activated."""
    B, C, E, H, W, activated = shape.values()
    before = draw(generator, B, 2, C) if activated else None
    weight, bias = draw(generator, E, 1, 3, 3), draw(generator, E)
    return [draw(generator, B, C, H, W), before, weight, bias, draw(generator, B, 2, E)]


def cast(given: list, *to) -> list:
    return [None if value is None else value.to(*to) for value in given]


def run(x: torch.Tensor, *others) -> torch.Tensor:
    # Not at the top: who imports Triton decides whether it is interpreted.
    from mfkernels.deploy.gpu.activated_depthwise_triton import activated_depthwise

    return activated_depthwise(x, *others)


def check(shape: dict, dtype: torch.dtype, device: str) -> None:
    """The one tolerance, in all layouts."""
    errors = Errors()
    for seed, layout in enumerate(LAYOUTS):
        given = cast(make(shape, torch.Generator().manual_seed(seed)), device, dtype)
        truth = activated_depthwise_reference(*cast(given, torch.float64))
        errors.reference(activated_depthwise_reference(*given), truth)
        errors.kernel(run(layout(given[0]), *given[1:]), truth)
    errors.check(f"activated_depthwise {shape}")


@interpreted
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape, dtype):
    check(shape, dtype, "cpu")


@interpreted
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_integers_are_exact(shape):
    given = make(
        shape, torch.Generator().manual_seed(0), lambda generator, *of: integers(generator, -3, 3, *of)
    )
    assert torch.equal(run(*cast(given, torch.float32)).double(), activated_depthwise_reference(*given))


@interpreted
def test_the_result_has_the_memory_format_of_x():
    given = cast(make(SHAPES[0], torch.Generator().manual_seed(0)), torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = given[0].contiguous(memory_format=memory_format)
        assert run(x, *given[1:]).is_contiguous(memory_format=memory_format)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "before", "weight", "bias", "behind"])
def test_not_finite(where, bad):
    given = cast(make(SHAPES[0], torch.Generator().manual_seed(0)), torch.float32)
    # The middle of a kernel meets no zeros around the map: libraries differ in whether they multiply them.
    place = dict(x=(0, 2, 4, 4), before=(0, 1, 2), weight=(2, 0, 1, 1), bias=(2,), behind=(0, 0, 2))[where]
    given[["x", "before", "weight", "bias", "behind"].index(where)][place] = bad
    expected, got = activated_depthwise_reference(*given), run(*given)
    assert not expected.isfinite().all() and expected.isfinite().any()
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, dict(B=2, C=240, E=240, H=61, W=97, activated=True)], ids=str)
def test_on_a_gpu(shape, dtype):
    check(shape, dtype, "cuda")


@pytest.mark.gpu
def test_graphs_and_streams():
    given = cast(make(SHAPES[0], torch.Generator().manual_seed(0)), "cuda", torch.bfloat16)
    expected = run(*given)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = run(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(*given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, expected) and torch.equal(recorded, expected)

"""The Triton kernels that deployed networks alone have: interpreted, and with a GPU as they are."""

import importlib
import importlib.util
import math
from functools import partial

import pytest
import torch
from cases import integers, normal
from test_contract import LAYOUTS
from tolerance import Errors

from mfkernels.deploy.gpu.activated_conv import (
    dynamic_conv_reference,
    response_factors_reference,
    response_gelu_reference,
)
from mfkernels.deploy.gpu.former_to_mobile import former_to_mobile_reference
from mfkernels.deploy.gpu.kernel_scores import kernel_scores_reference
from mfkernels.deploy.gpu.pointwise import pointwise_reference
from mfkernels.deploy.gpu.token_steps import outputs_of_tokens_reference, update_tokens_reference
from mfkernels.operators.dispatch import triton_interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(
    not triton_interpreted(), reason="kernels run on the GPU here, not interpreted"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SCORES = [
    dict(B=2, S=3, C=10, d=32, K=4, softmax=False),
    dict(B=1, S=1, C=70, d=64, K=8, softmax=True),
    dict(B=3, S=40, C=5, d=32, K=1, softmax=False),
    dict(B=1, S=1, C=1, d=96, K=3, softmax=True),
    dict(B=0, S=1, C=4, d=32, K=4, softmax=False),
]
CONVS = [
    dict(B=2, C=8, O=12, k=1, groups=4, K=4, H=9, W=13),
    dict(B=1, C=17, O=40, k=1, groups=1, K=8, H=5, W=30),
    dict(B=2, C=10, O=10, k=3, groups=10, K=3, H=20, W=11),
    dict(B=1, C=4, O=4, k=3, groups=2, K=2, H=1, W=1),
    dict(B=1, C=9, O=9, k=3, groups=9, K=0, H=12, W=14),
    dict(B=0, C=4, O=4, k=1, groups=1, K=2, H=3, W=3),
]
UPDATES = [
    dict(B=2, T=3, C=8, d=32, gated=True, ffn=True),
    dict(B=1, T=6, C=70, d=48, gated=False, ffn=True),
    dict(B=3, T=17, C=5, d=16, gated=True, ffn=False),
    dict(B=2, T=4, C=12, d=16, gated=True, ffn=None),
    dict(B=0, T=2, C=4, d=16, gated=False, ffn=False),
]
OUTPUTS = [
    dict(B=2, T=3, d=32, units=8, first=24, second=40, layers=[12, 12, 20, 20]),
    dict(B=1, T=6, d=48, units=12, first=140, second=2, layers=[70, 70, 5]),
    dict(B=9, T=2, d=16, units=17, first=2, second=8, layers=[3, 3]),
    dict(B=0, T=2, d=16, units=4, first=2, second=8, layers=[3, 3]),
]
BRIDGES = [
    dict(B=2, C=8, H=9, W=13, T=3, heads=2, residual=True),
    dict(B=1, C=33, H=3, W=5, T=6, heads=1, residual=False),
]
POINTWISE = [
    dict(B=2, C=8, O=12, H=9, W=13, residual=True, gelu=False),
    dict(B=1, C=70, O=130, H=3, W=5, residual=False, gelu=True),
    dict(B=1, C=33, O=17, H=10, W=11, residual=True, gelu=True),
    dict(B=2, C=1, O=1, H=1, W=1, residual=False, gelu=False),
    dict(B=0, C=4, O=4, H=3, W=3, residual=True, gelu=True),
]
RESPONSES = [dict(B=2, C=6, H=9, W=13, mean="released"), dict(B=1, C=70, H=3, W=5, mean="channels")]


def make_scores(shape: dict, generator: torch.Generator, draw=normal) -> list:
    """Arguments; pixels are a power of two, so that integers stay exact."""
    B, S, C, d, K, softmax = shape.values()
    weights = draw(generator, d, d + C), draw(generator, d), draw(generator, K, d)
    return [draw(generator, B, S, C), 4, draw(generator, B, d), *weights, softmax]


def make_conv(shape: dict, generator: torch.Generator, draw=normal, gelu=True) -> list:
    B, C, outputs, k, groups, K, H, W = shape.values()
    kernel = outputs, C // groups, k, k
    given = [draw(generator, *of) for of in ((B, C, H, W), kernel, (K, *kernel), (B, K), (outputs,))]
    return [*given, 1, k // 2, groups, 0.5, gelu, 1 + k // 2]


def make_response(shape: dict, generator: torch.Generator) -> list:
    B, C, H, W, mean = shape.values()
    return [normal(generator, B, C, H, W), normal(generator, C), normal(generator, C), mean, 1e-6]


def make_factors(shape: dict, generator: torch.Generator) -> list:
    B, C, parts, _, mean = shape.values()
    return [normal(generator, B, parts, C) ** 2, normal(generator, C), mean, 1e-6]


def linear(generator: torch.Generator, inputs: int, outputs: int) -> list:
    return [normal(generator, outputs, inputs) / inputs**0.5, normal(generator, outputs)]


def make_update(shape: dict, generator: torch.Generator) -> list:
    B, T, C, d, gated, ffn = shape.values()
    layers = linear(generator, C, d)
    former = [] if ffn is None else [(d, d), (d, d), (d,)]  # None: no Former
    for sizes in ((d,), *former, *([(d, 2 * d), (2 * d, d), (d,)] if ffn else [])):
        norm = [normal(generator, *sizes), normal(generator, *sizes)] if len(sizes) == 1 else None
        layers += norm or linear(generator, *sizes)
    gates = normal(generator, B, T, C) if gated else None
    return [normal(generator, B, T, C), gates, normal(generator, B, T, d), layers, 2, 1e-5]


def make_outputs(shape: dict, generator: torch.Generator) -> list:
    B, T, d, units, first, second, outputs = shape.values()
    sizes = [(d, units), (units, first), (d, units), (units, second), *((d, n) for n in outputs)]
    layers = [value for size in sizes for value in linear(generator, *size)]
    return [normal(generator, B, T, d), T - 1, layers[:8], layers[8:]]


def make_bridge(shape: dict, generator: torch.Generator) -> list:
    B, C, H, W, T, heads, residual = shape.values()
    tokens = [normal(generator, B, T, C) for _ in range(2)]
    other = normal(generator, B, C, H, W) if residual else None
    return [normal(generator, B, C, H, W), other, *tokens, heads]


def make_pointwise(shape: dict, generator: torch.Generator, draw=normal) -> list:
    B, C, outputs, H, W, residual, gelu = shape.values()
    other = draw(generator, B, outputs, H, W) if residual else None
    weights = draw(generator, outputs, C, 1, 1), draw(generator, outputs)
    response = (None, None)
    if gelu and residual:
        response = draw(generator, B, C).abs(), draw(generator, C)
    return [draw(generator, B, C, H, W), *weights, other, gelu, *response]


KERNELS = [(kernel_scores_reference, make_scores, shape) for shape in SCORES]
KERNELS += [(dynamic_conv_reference, make_conv, shape) for shape in CONVS]
KERNELS += [(response_gelu_reference, make_response, shape) for shape in RESPONSES]
KERNELS += [(response_factors_reference, make_factors, shape) for shape in RESPONSES]
KERNELS += [(update_tokens_reference, make_update, shape) for shape in UPDATES]
KERNELS += [(outputs_of_tokens_reference, make_outputs, shape) for shape in OUTPUTS]
KERNELS += [(former_to_mobile_reference, make_bridge, shape) for shape in BRIDGES]
KERNELS += [(pointwise_reference, make_pointwise, shape) for shape in POINTWISE]
MODULES = dict(
    kernel_scores="kernel_scores",
    dynamic_conv="activated_conv",
    response_factors="activated_conv",
    response_gelu="activated_conv",
    update_tokens="token_steps",
    outputs_of_tokens="token_steps",
    former_to_mobile="former_to_mobile",
    pointwise="pointwise",
)


def named(value: object) -> str:
    """Return a name that is the same in all processes of a test run: without addresses."""
    function = getattr(value, "func", value)  # of a partial
    return getattr(function, "__name__", str(value))


kernels = pytest.mark.parametrize("reference, make, shape", KERNELS, ids=named)


def cast(given: list, *to) -> list:
    """Tensors alone, and those of lists."""
    return [
        value.to(*to)
        if isinstance(value, torch.Tensor)
        else cast(value, *to)
        if isinstance(value, list)
        else value
        for value in given
    ]


def run(reference, *given) -> list[torch.Tensor]:
    """The results; of a map's sums all parts together."""
    # Not at the top: who imports Triton decides whether it is interpreted.
    name = reference.__name__.removesuffix("_reference")
    module = importlib.import_module(f"mfkernels.deploy.gpu.{MODULES[name]}_triton")
    return together(reference, getattr(module, name)(*given))


def together(reference, results) -> list[torch.Tensor]:
    if reference is dynamic_conv_reference:
        return [results[0], results[1].sum(1)]
    return results if isinstance(results, list) else [results]


def check(reference, make, shape: dict, dtype: torch.dtype, device: str) -> None:
    """The one tolerance, in all layouts of the first argument."""
    errors = {}
    for seed, layout in enumerate(LAYOUTS):
        given = cast(make(shape, torch.Generator().manual_seed(seed)), device, dtype)
        truth = together(reference, reference(*cast(given, torch.float64)))
        first = layout(given[0]) if given[0].dim() == 4 else given[0]
        for i, (got, plain, exact) in enumerate(
            zip(run(reference, first, *given[1:]), together(reference, reference(*given)), truth, strict=True)
        ):
            assert got.shape == exact.shape
            errors.setdefault(i, Errors()).reference(plain, exact)
            errors[i].kernel(got, exact)
    for i, error in errors.items():
        error.check(f"{reference.__name__} {shape}, result {i}")


@interpreted
@dtypes
@kernels
def test_interpreted(reference, make, shape, dtype):
    check(reference, make, shape, dtype, "cpu")


@interpreted
@pytest.mark.parametrize(
    "reference, make, shape",
    [(dynamic_conv_reference, partial(make_conv, gelu=False), shape) for shape in CONVS]
    + [(pointwise_reference, make_pointwise, shape | dict(gelu=False)) for shape in POINTWISE],
    ids=named,
)
def test_integers_are_exact(reference, make, shape):
    generator = torch.Generator().manual_seed(0)
    given = make(shape, generator, draw=lambda generator, *of: integers(generator, -3, 3, *of))
    expected = together(reference, reference(*given))
    for got, exact in zip(run(reference, *cast(given, torch.float32)), expected, strict=True):
        assert torch.equal(got.double(), exact)


@interpreted
def test_a_strided_token_is_taken_as_it_is():
    given = cast(make_scores(SCORES[0], torch.Generator().manual_seed(0)), torch.float32)
    expected = run(kernel_scores_reference, *given)[0]
    tokens = torch.zeros(2, 3, 32)
    tokens[:, 0] = given[2]
    for token in (tokens[:, 0], given[2].t().contiguous().t()):
        given[2] = token
        assert torch.equal(run(kernel_scores_reference, *given)[0], expected)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 2, 3, 4, 5])
def test_scores_that_are_not_finite(where, bad):
    given = cast(make_scores(SCORES[0], torch.Generator().manual_seed(0)), torch.float32)
    given[where][(1,) * given[where].dim()] = bad
    expected, got = kernel_scores_reference(*given), run(kernel_scores_reference, *given)[0]
    assert expected.isnan().any() or not math.isnan(bad)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.gpu
@dtypes
@kernels
def test_on_a_gpu(reference, make, shape, dtype):
    check(reference, make, shape, dtype, "cuda")

"""The promises that every operator keeps. The operators' samples are in `tests/cases`."""

import functools
import random
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from cases import Sample, modules
from tolerance import Errors
from torch import Tensor
from wide import narrow, widen

import mfkernels
from mfkernels import _C

OPERATORS = modules()
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FUZZ = 2000  # samples an operator, over all instruction sets and dtypes

operator = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.NAME)


def on_cpu_kernels(test):
    """Not by PyTorch's own products, which are the faster way for some shapes."""

    @functools.wraps(test)
    def run_test(*args, **kwargs):
        with mfkernels.use_backend("cpu"):
            return test(*args, **kwargs)

    return run_test


# --- layouts ---------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def reversed_axes(x: Tensor) -> Tensor:
    """The same values with the strides of the reversed axes."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def guarded(x: Tensor) -> Tensor:
    """A view into a buffer of NaN: reading beside it shows in the result."""
    buffer = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def guarded_dense(x: Tensor) -> Tensor:
    """A contiguous view with NaN before and behind it."""
    buffer = torch.full([x.numel() + 128], float("nan"), dtype=x.dtype, device=x.device)
    return buffer[64 : 64 + x.numel()].view(x.shape).copy_(x)


def same(x: Tensor) -> Tensor:
    return x


def far_apart(x: Tensor) -> Tensor:
    """Two samples more than 2^31 elements apart, in memory that is asked for and hardly touched."""
    if x.dim() < 2 or x.shape[0] != 2:
        return x
    inner = x[0].contiguous()
    far = torch.empty(2**31 + 64 + inner.numel(), dtype=x.dtype, device=x.device)
    return far.as_strided(x.shape, (2**31 + 64, *inner.stride())).copy_(x)


LAYOUTS = (same, channels_last, reversed_axes, guarded, guarded_dense)


def expanded(x: Tensor) -> Tensor:
    """All strides zero."""
    return x.new_ones(()).expand(x.shape)


# --- running ---------------------------------------------------------------------------------------------


def run(op, sample: Sample, function, cotangents: dict[str, Tensor], layout=same) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    sample = sample.map(lambda v: layout(v.detach().clone()).requires_grad_())
    outputs = sample.call(function)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    inputs = sample.given()
    results = {f"output {i}": out for i, out in enumerate(outputs)}
    grads = [cotangents[name].to(out.dtype).expand(out.shape) for name, out in results.items()]
    if layout is widen:
        grads = [widen(grad) for grad in grads]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), grads)
    results |= {f"gradient of {name}": value for name, value in zip(inputs, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def cotangents_of(op, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
    outputs = sample.call(op.REFERENCE)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = {f"output {i}": torch.randn(o.shape, generator=generator).double() for i, o in enumerate(outputs)}
    return draw


@contextmanager
def poisoned():
    """New tensors, PyTorch's and ours, and the kernels' working memory hold NaN until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    _C.poison_memory(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    try:
        yield
    finally:
        _C.poison_memory(False)
        torch.use_deterministic_algorithms(before)


class Expected(NamedTuple):
    """A sample's truth, and what the reference makes of it in `dtype`."""

    sample: Sample
    cotangents: dict[str, Tensor]
    truth: dict[str, Tensor]
    rest: dict[str, Tensor]  # where float64 cannot hold the truth, it is truth + rest
    eager: dict[str, Tensor]


def expect(op, sample: Sample, generator: torch.Generator, dtype: torch.dtype, grad_layout=same) -> Expected:
    """The truth is the reference in float64; for float64 kernels, in 80 bits."""
    sample = sample.map(lambda v: v.to(dtype).double())  # the truth starts from the same numbers
    cotangents = {k: v.to(dtype).double() for k, v in cotangents_of(op, sample, generator).items()}
    cotangents = {k: grad_layout(v) for k, v in cotangents.items()}
    wide = dtype == torch.float64
    truth, rest = run(op, sample, op.REFERENCE, cotangents, widen if wide else same), {}
    if wide:
        truth, rest = narrow(truth)
    eager = run(op, sample.map(lambda v: v.to(dtype)), op.REFERENCE, cotangents)
    return Expected(sample, cotangents, truth, rest, eager)


@functools.cache  # the same for all layouts and instruction sets
def expect_chosen(op, index: int, seed: int, dtype: torch.dtype) -> Expected:
    generator = torch.Generator().manual_seed(seed)
    return expect(op, op.make(op.CHOSEN[index], generator), generator, dtype)


class Comparison:
    """Kernel against reference on several samples: the one tolerance for every output and gradient."""

    def __init__(self, op, dtype: torch.dtype, backend: str = "cpu", device: str = "cpu") -> None:
        self.op, self.dtype, self.backend, self.device = op, dtype, backend, device
        self.errors: dict[str, Errors] = {}

    def add(self, expected: Expected, layout=same, grad_layout=same) -> None:
        op, dtype = self.op, self.dtype
        # Poison would touch all of the memory that is far apart.
        with nullcontext() if layout is far_apart else poisoned(), mfkernels.use_backend(self.backend):
            typed = {k: grad_layout(v.to(self.device, dtype)) for k, v in expected.cotangents.items()}
            sample = expected.sample.map(lambda v: v.to(self.device, dtype))
            ours = run(op, sample, op.OP, typed, layout)
        truth, rest, eager = expected.truth, expected.rest, expected.eager
        assert ours.keys() == truth.keys()
        for name, value in ours.items():
            assert value.dtype == eager[name].dtype and value.device.type == self.device
            assert value.shape == truth[name].shape
            errors = self.errors.setdefault(name, Errors())
            errors.reference(eager[name], truth[name], rest.get(name))
            errors.kernel(value.cpu(), truth[name], rest.get(name))

    def check(self, what: str) -> None:
        for name, errors in self.errors.items():
            errors.check(f"{self.op.NAME} {self.dtype} {what}, {name}")


# --- numbers -----------------------------------------------------------------------------------------------


@operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_chosen_shapes(op, dtype, layout, instruction_set):
    for index, shape in enumerate(op.CHOSEN):
        comparison = Comparison(op, dtype)
        large = max(v.numel() for v in op.make(shape, torch.Generator()).given().values()) > 5000
        for seed in range(2 if large else 8):
            comparison.add(expect_chosen(op, index, seed, dtype), layout)
        comparison.check(f"{shape}")


@operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fuzz(op, dtype, instruction_set):
    """Groups of twenty samples; a failure names the seed of its group."""
    groups = FUZZ // (20 * len(DTYPES) * len(mfkernels.native.supported_instruction_sets()))
    for seed in range(groups):
        rng = random.Random(f"{seed} {dtype} {instruction_set}")
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        comparison = Comparison(op, dtype)
        for _ in range(20):
            sample = op.make(op.random_shape(rng), generator)
            layout, grad_layout = rng.choice(LAYOUTS), rng.choice((*LAYOUTS, expanded))
            comparison.add(expect(op, sample, generator, dtype, grad_layout), layout, grad_layout)
        comparison.check(f"seed {seed}")


@operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", (same, channels_last), ids=lambda f: f.__name__)
def test_integers_are_exact(op, dtype, layout, instruction_set):
    generator = torch.Generator().manual_seed(0)
    for index, sample in enumerate(op.make_exact(generator)):
        cotangents = {k: v.mul(2).round() for k, v in cotangents_of(op, sample, generator).items()}
        truth = run(op, sample, op.REFERENCE, cotangents)
        with mfkernels.use_backend("cpu"):
            ours = run(op, sample.map(lambda v: v.to(dtype)), op.OP, cotangents, layout)
        for name, value in ours.items():
            expected = truth[name].to(dtype)
            assert name != "output 0" or (expected != 0).any()
            assert torch.equal(value, expected), f"{op.NAME} sample {index}, {name}"


@operator
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(op, bad, instruction_set):
    """NaN and infinity come out where the reference has them: in float64, since GELU of infinity is NaN in
    PyTorch's float32."""
    generator = torch.Generator().manual_seed(3)
    for shape in (op.CHOSEN[1], *(op.random_shape(random.Random(i)) for i in range(6))):
        sample = op.make(shape, generator).map(lambda v: v.float())
        for name in sample.given():
            tensors = {k: None if v is None else v.clone() for k, v in sample.tensors.items()}
            tensors[name].view(-1)[tensors[name].numel() // 2] = bad
            with mfkernels.use_backend("cpu"):
                ours = Sample(tensors, sample.others).call(op.OP)
            expected = Sample(tensors, sample.others).map(lambda v: v.double()).call(op.REFERENCE)
            pairs = zip(ours, expected, strict=True) if isinstance(ours, tuple) else [(ours, expected)]
            for value, other in pairs:
                assert torch.equal(value.isnan(), other.isnan()), f"{name} {shape}"
                assert torch.equal(value.isinf(), other.isinf()), f"{name} {shape}"


@operator
def test_inputs_are_left_alone(op, instruction_set):
    generator = torch.Generator().manual_seed(0)
    sample = op.make(op.CHOSEN[0], generator).map(lambda v: guarded_dense(v.float()))
    before = {k: v._base.clone() for k, v in sample.given().items()}
    cotangents = cotangents_of(op, sample, generator)
    with mfkernels.use_backend("cpu"):
        tracked = sample.map(lambda v: v.requires_grad_())
        outputs = tracked.call(op.OP)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, list(tracked.given().values()), [c.float() for c in cotangents.values()])
    for name, value in sample.given().items():
        assert torch.equal(value._base.detach().nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@operator
def test_same_bits_every_time(op, instruction_set):
    """Repeated, and on one thread or on several."""
    generator = torch.Generator().manual_seed(0)
    sample = op.make(op.CHOSEN[0], generator).map(lambda v: v.float())
    cotangents = {k: v.float() for k, v in cotangents_of(op, sample, generator).items()}
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 4, 4, 4):
            torch.set_num_threads(number)
            with mfkernels.use_backend("cpu"):
                results.append(run(op, sample, op.OP, cotangents))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@operator
def test_indices_beyond_32_bits(op, instruction_set):
    try:
        torch.empty(2**31 + 2**20)
    except RuntimeError:
        pytest.skip("this machine does not lend memory that is not touched")
    generator = torch.Generator().manual_seed(0)
    comparison = Comparison(op, torch.float32)
    for sample in _small(op, torch.float32, 3):
        comparison.add(expect(op, sample, generator, torch.float32), far_apart)
    comparison.check("far apart")


# --- behaviour in PyTorch ----------------------------------------------------------------------------------


def _small(op, dtype: torch.dtype, count: int = 4) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    rng = random.Random(1)
    small = [op.random_shape(rng) | dict(B=2, H=3, W=4) for _ in range(count)]
    return [op.make(shape, generator).map(lambda v: v.to(dtype)) for shape in small]


@operator
def test_opcheck(op):
    function = getattr(torch.ops.mfkernels, op.NAME).default
    for sample in _small(op, torch.float32):
        for layout in (same, channels_last):
            tracked = sample.map(lambda v, layout=layout: layout(v).requires_grad_())
            torch.library.opcheck(function, op.native(tracked))


@operator
@on_cpu_kernels
def test_gradcheck(op, instruction_set):
    for sample in _small(op, torch.float64):
        names = list(sample.given())

        def function(*values, sample=sample, names=names):
            return Sample(sample.tensors | dict(zip(names, values, strict=True)), sample.others).call(op.OP)

        values = [v.requires_grad_() for v in sample.given().values()]
        assert torch.autograd.gradcheck(function, values, fast_mode=False)


@operator
@on_cpu_kernels
def test_some_inputs_without_gradient(op):
    for sample in _small(op, torch.float32, 2):
        every = run(op, sample, op.OP, cotangents_of(op, sample, torch.Generator().manual_seed(5)))
        cotangents = cotangents_of(op, sample, torch.Generator().manual_seed(5))
        for name in sample.given():
            tensors = {k: None if v is None else v.clone() for k, v in sample.tensors.items()}
            tensors[name].requires_grad_()
            outputs = Sample(tensors, sample.others).call(op.OP)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, c.float()) for o, c in zip(outputs, cotangents.values(), strict=True)]
            tracked, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            (gradient,) = torch.autograd.grad(tracked, [tensors[name]], grads)
            assert torch.equal(gradient, every[f"gradient of {name}"]), name


@operator
@on_cpu_kernels
def test_compile_without_graph_break(op):
    torch.compiler.reset()
    sample = _small(op, torch.float32, 1)[0]
    cotangents = {k: v.float() for k, v in cotangents_of(op, sample, torch.Generator()).items()}
    compiled = torch.compile(op.OP, fullgraph=True, backend="aot_eager")
    expected, got = run(op, sample, op.OP, cotangents), run(op, sample, compiled, cotangents)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@operator
def test_export_keeps_the_operator(op):
    sample = _small(op, torch.float32, 1)[0]

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return op.OP(**tensors, **sample.others)

    program = torch.export.export(Module(), (sample.tensors,))
    assert any(op.NAME in str(node.target) for node in program.graph.nodes)
    expected, got = sample.call(op.OP), program.module()(sample.tensors)
    for value, other in zip(*([x] if isinstance(x, Tensor) else x for x in (expected, got)), strict=True):
        assert torch.equal(value, other)


@operator
def test_output_has_the_memory_format_of_x(op):
    for sample in _small(op, torch.float32):
        for layout in (same, channels_last):
            outputs = sample.map(layout).call(op.OP)
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            if first.dim() == 4:
                format = torch.channels_last if layout is channels_last else torch.contiguous_format
                assert first.is_contiguous(memory_format=format)


@operator
@on_cpu_kernels
def test_gradient_of_gradient_is_an_error(op):
    sample = _small(op, torch.float32, 1)[0].map(lambda v: v.requires_grad_())
    outputs = sample.call(op.OP)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    (gradient,) = torch.autograd.grad(first.sum(), [next(iter(sample.given().values()))], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        gradient.sum().backward()


@operator
def test_every_layer_has_the_name(op):
    """One name: public function, registered operator, reference, and a sample file."""
    assert op.OP is getattr(mfkernels.ops, op.NAME)
    assert hasattr(torch.ops.mfkernels, op.NAME)
    assert op.REFERENCE.__name__ == f"{op.NAME}_reference"
    assert op.__name__ == f"cases.{op.NAME}"


def test_every_operator_has_samples():
    assert sorted(op.NAME for op in OPERATORS) == sorted(mfkernels.ops.__all__)

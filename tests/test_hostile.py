"""What nobody would do on purpose: settings of any size, arguments on different devices, plans that were
changed, no memory left. Each gets the numbers of PyTorch or an exception; what might kill the process runs
in a child."""

import copy
import io
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import modules
from tolerance import Errors

import mfkernels
from mfkernels import ops
from mfkernels.checks import tensors_in
from mfkernels.models import IFormer, MobileFormer

STATM = Path("/proc/self/statm")
MOST = (1 << 63) - 1
ROWS = [("D", 2, 8, 1, 1, 0), ("D", 3, 12, 1, 2, 4)]


def in_child(function, *arguments):
    """What a function returns that may kill the process it runs in, or how it died."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child():
        signal.alarm(120)
        torch.set_num_threads(1)  # those of the parent are not in the child
        try:
            result = function(*arguments)
        except Exception as error:
            result = error
        send.send_bytes(pickle.dumps(result))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()
    try:
        result = pickle.loads(receive.recv_bytes())
    except EOFError:
        process.join()
        return f"killed by {-process.exitcode}"
    process.join()
    return result


def convolve(backend, dtype, compute, settings):
    """Result and gradients for numbers of `dtype`, computed in `compute`."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 7, 8), (6, 2, 3, 3), (2, 6, 2, 3, 3), (2, 2), (6,), (2, 6)
    values = [torch.randn(shape, generator=generator).to(dtype).to(compute) for shape in shapes]
    x, *others = [value.requires_grad_() for value in values]
    if settings.pop("channels_last", False):
        x = x.contiguous(memory_format=torch.channels_last)
    with mfkernels.use_backend(backend):
        y = ops.dynamic_conv2d(x, *others, groups=2, **settings)
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(compute)
        return [t.detach() for t in (y, *torch.autograd.grad(y, values, grad))]


EXTREMES = [
    *(dict(stride=s) for s in (1000, 1 << 20, 1 << 32, 1 << 61, MOST, (1, 1 << 40), (1 << 61, 4))),
    *(dict(stride=1 << 61, padding=p) for p in (1, 1 << 61)),
    *(dict(dilation=d, padding=d) for d in (100, 1 << 15, 1 << 32, 1 << 61)),
    dict(dilation=(1 << 40, 1), padding=(1 << 40, 1), stride=(1, 2), channels_last=True),
    dict(padding=1 << 31, stride=1 << 31),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_convolution_with_settings_of_any_size(settings, dtype):
    results = in_child(convolve, "auto", dtype, dtype, dict(settings))
    assert isinstance(results, list), results
    truth = convolve("reference", dtype, torch.float64, dict(settings))
    plain = convolve("reference", dtype, dtype, dict(settings))
    errors = Errors()
    for result, expected, reference in zip(results, truth, plain, strict=True):
        errors.kernel(result, expected)
        errors.reference(reference, expected)
    errors.check(str(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(stride=1 << 63), "stride must be below 2^63"),
        (dict(padding=1 << 62), "padding must be below 2^62"),
        (dict(padding=1 << 61), "the result would be too large"),
        (dict(dilation=MOST), "x is too small"),
        (dict(groups=1 << 62), "groups must be positive and divide"),
    ],
    ids=lambda value: str(value),
)
def test_convolution_that_no_one_can_do(settings, message):
    values = [torch.ones(s) for s in ((2, 4, 7, 8), (6, 2, 3, 3), (2, 6, 2, 3, 3), (2, 2))]
    error = in_child(lambda: ops.dynamic_conv2d(*values, **dict(groups=2) | settings))
    assert isinstance(error, ValueError | RuntimeError) and message in str(error), error


def test_counts_without_bounds():
    """No channels, or no pixels, are divisible by any number."""
    call, none = torch.ops.mfkernels, torch.ones(2, 0, 4, 5)
    tokens = torch.ones(2, 3, 0)
    for function in (
        lambda: call.mobile_to_former_attention(none, tokens, 1 << 62),
        lambda: call.former_to_mobile_attention(none, tokens, tokens, 1 << 62),
    ):
        error = in_child(function)
        assert isinstance(error, RuntimeError) and "num_heads must be positive and divide" in str(error), (
            error
        )
    empty = torch.ones(2, 3, 0, 0)
    result = in_child(lambda: call.modulation_attention(empty, empty, empty, empty, None, "paper", 1 << 62))
    assert isinstance(result, torch.Tensor) and result.shape == empty.shape, result
    huge = torch.ones(1, 1, 1, 1).expand(1 << 20, 1, 1 << 20, 2)
    for function in (
        lambda: call.dynamic_relu(huge, torch.ones(1).expand(1 << 20, 2, 1)),
        lambda: call.batch_norm(huge, torch.ones(1), torch.ones(1)),
    ):
        error = in_child(function)
        assert isinstance(error, RuntimeError) and "x must have at most 2^40 elements" in str(error), error


def samples():
    """Of each operator."""
    made = []
    for module in modules():
        sample = module.make(module.CHOSEN[0], torch.Generator().manual_seed(0)).map(lambda t: t.float())
        made.append(pytest.param(module, sample, id=module.NAME))
    return made


@pytest.mark.parametrize(("module", "sample"), samples())
def test_one_argument_on_meta(module, sample):
    """PyTorch then asks for a result on that device, and none of the CPU's memory is one."""
    arguments = list(module.native(sample))
    operator = getattr(torch.ops.mfkernels, module.NAME)
    assert refused(operator, arguments) == sum(isinstance(a, torch.Tensor) for a in arguments)
    leaves = {name: t.requires_grad_() for name, t in sample.given().items()}
    with mfkernels.use_backend("cpu"):  # the kernels, even where PyTorch's own operators are the faster ones
        outputs = tensors_in(module.OP(**sample.tensors | leaves, **sample.others))
    recorded = []
    with _Recorder(recorded):
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for name, given in recorded:
        assert refused(getattr(torch.ops.mfkernels, name), list(given)) >= 3
    assert recorded


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes calls of backward operators."""

    def __init__(self, recorded):
        super().__init__()
        self.recorded = recorded

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mfkernels":
            self.recorded.append((function._schema.name.split("::")[1], args))
        return function(*args, **kwargs or {})


def refused(operator, arguments):
    """How many tensors there are; each on meta is refused."""
    count = 0
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            count += 1
            with pytest.raises(ValueError, match="must be on the device of"):
                operator(*arguments[:i], value.to("meta"), *arguments[i + 1 :])
    return count


def deploy(family):
    torch.manual_seed(0)
    if family == "iformer":
        types = ["ConvBlock_k7_r2", "SHMABlock_r1_hdrr2_nh1"]
        model = IFormer((1, 0, 0, 1), (12, 20, 36, 40), types, num_classes=5)
    else:
        model = MobileFormer(ROWS, num_classes=5, stem_channels=8, features=32, token_dim=32, token_num=3)
    return mfkernels.deploy(model.eval())


@pytest.fixture(scope="module", params=["mobile_former", "iformer"])
def deployed(request):
    return deploy(request.param)


def test_deployed_on_meta(deployed):
    x = torch.randn(1, 3, 32, 32)
    assert copy.deepcopy(deployed).to("meta")(x.to("meta")).device.type == "meta"
    for name in ("weights", "plan"):
        other = copy.deepcopy(deployed)
        setattr(other, name, getattr(other, name).to("meta"))
        with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, got meta"):
            other(x)
    with pytest.raises(RuntimeError, match="plan must have format 8"):
        copy.deepcopy(deployed).to_empty(device="cpu").apply(lambda m: m.plan.zero_())(x)


def test_changed_plans_are_refused(deployed):
    """Any word, by the smallest bit or the largest, from Python and in an exported program."""
    x, rng, calls = torch.randn(1, 3, 32, 32), random.Random(0), 0
    program = torch.export.export(deployed, (x,)).module()
    good, plan = deployed(x), deployed.plan.clone()
    exported = next(b for b in program.buffers() if b.dtype == torch.int64)
    for i in [*range(4), *rng.sample(range(4, len(plan)), 56)]:
        for value in (int(plan[i]) ^ 1, int(plan[i]) ^ (-1 << 63)):
            for target, call in ((deployed.plan, deployed), (exported, program)):
                target[i] = value
                with pytest.raises(RuntimeError, match=r"deploy: (plan|classes) must "):
                    call(x)
                target.copy_(plan)
                calls += 1
    assert calls == 240 and torch.equal(deployed(x), good) and torch.equal(program(x), good)
    with pytest.raises(RuntimeError, match="plan must have format 8, got 2 numbers"):
        torch.ops.mfkernels.deployed(x, deployed.weights, plan[:2].clone(), 5)
    with pytest.raises(RuntimeError, match="classes must be 5, as of the plan, got 4"):
        torch.ops.mfkernels.deployed(x, deployed.weights, plan, 4)


def test_state_of_deployed_networks(deployed):
    x, state = torch.randn(1, 3, 32, 32), deployed.state_dict()
    good = deployed(x)
    assert list(state) == ["weights", "_extra_state"]
    other = copy.deepcopy(deployed)
    other.weights.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), good)
    unlike = mfkernels.deploy(mfkernels.models.create_model("mobile_former_26m", num_classes=5).eval())
    old = {"weights": state["weights"], "plan": deployed.plan[3:]}
    for wrong, message in (
        (old, "plan is of an older version of mfkernels"),
        ({"weights": state["weights"]}, r"_extra_state must be \[8, .*got NoneType"),
        (unlike.state_dict(), "weights must be float32 of shape"),
        (
            {**state, "weights": state["weights"].double()},
            "weights must be float32 of shape .* got torch.float64",
        ),
        ({**state, "_extra_state": unlike.get_extra_state()}, r"_extra_state must be \[8, .*another network"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.nn.Sequential(other).load_state_dict({f"0.{name}": value for name, value in wrong.items()})
        assert torch.equal(other(x), good)
    with pytest.raises(RuntimeError, match=r"Missing key.*weights"):
        other.load_state_dict({})


@pytest.mark.parametrize("change", ["version", "word", "nothing"])
def test_pickles_of_deployed_networks(deployed, change):
    x, other = torch.randn(1, 3, 32, 32), copy.deepcopy(deployed)
    if change == "version":  # plans began with what they say of the network
        other.plan = other.plan[3:].clone()
    elif change == "word":
        other.plan[-1] += 1
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    if change == "nothing":
        assert torch.equal(torch.load(file, weights_only=False)(x), deployed(x))
        return
    message = "plan must have format 8" if change == "version" else "plan must have the checksum"
    with pytest.raises(RuntimeError, match=message):
        torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match=message):
        copy.deepcopy(other)


def without_memory(call, large, small, threads=1):
    """The exception of a call with an argument of a large shape, for which there is no memory; one of a small
    shape has the same result after it. What is large are 100 megabytes: up to 64 the C library may have put
    aside."""
    torch.set_num_threads(threads)
    large, small = torch.ones(large), torch.ones(small)
    expected = call(small)
    size = int(STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (24 << 20), resource.RLIM_INFINITY))
    try:
        call(large)
    except RuntimeError as error:
        assert torch.equal(call(small), expected)
        return str(error)
    return "no exception"


def form(tokens):
    square, row = torch.ones(256, 256), torch.ones(256)
    return ops.former_block(tokens, square, None, square, None, row, row, num_heads=1)


def convolved(x):
    kernels = torch.ones(1, 8, 1, 3), torch.ones(2, 1, 8, 1, 3), torch.ones(1, 2)
    return ops.dynamic_conv2d(x, *kernels, padding=(0, 1))


def rectified(x):
    return ops.dynamic_relu(x, torch.ones(1, 2, 8))


SCARCE = {  # the call, the sizes of a large and a small argument, and for what there is no memory
    "former_block": (form, (1, 12000, 256), (1, 4, 256), "working memory"),
    "dynamic_conv2d": (convolved, (1, 8, 1, 4_000_000), (1, 8, 1, 9), "working memory"),
    "dynamic_relu": (rectified, (1, 8, 1, 4_000_000), (1, 8, 1, 9), "a tensor of shape (1, 8, 1, 4000000)"),
}
needs_statm = pytest.mark.skipif(not STATM.exists(), reason="needs to know what memory is in use")


def in_new_process(expression):
    """What an expression of this module prints in a process of its own: after many tests, this one has
    hundreds of megabytes put aside, and a fork of it would have them too, but none of PyTorch's threads."""
    run = subprocess.run(
        [sys.executable, "-c", f"from test_hostile import *; print({expression})"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    return run.stdout + run.stderr


@needs_statm
@pytest.mark.parametrize("name", SCARCE)
def test_no_memory_is_an_exception(name):
    message = in_new_process(f"without_memory(*SCARCE[{name!r}][:3])")
    assert "no memory for " in message and SCARCE[name][3] in message, message


def test_no_memory_for_the_norms_of_a_batch():
    """Of an image that is expanded, and so takes no memory itself."""
    x, one = torch.zeros(1, 1, 1, 1).expand(1 << 40, 1, 1, 1), torch.ones(1)
    with pytest.raises(RuntimeError, match="no memory for 1099511627776 numbers"):
        torch.ops.mfkernels.global_response_norm(x, one, one, "released")


@needs_statm
@pytest.mark.parametrize("family", ["mobile_former", "iformer"])
def test_no_memory_for_a_deployed_network(family):
    message = in_new_process(f"without_memory(deploy({family!r}), (1, 3, 1200, 3600), (1, 3, 32, 32))")
    assert "deploy: no memory for" in message, message


@needs_statm
def test_no_memory_on_other_threads():
    message = in_new_process("without_memory(form, (2, 6000, 256), (2, 4, 256), threads=2)")
    assert "bytes of working memory" in message, message


def test_calls_of_many_threads(deployed):
    """While the number of PyTorch's threads changes."""
    images = [torch.randn(b, 3, h, w) for b, h, w in ((1, 32, 32), (1, 65, 33), (3, 40, 24), (5, 1, 1))]
    expected, different, before = [deployed(x) for x in images], [], torch.get_num_threads()

    def work(seed):
        rng = random.Random(seed)
        for _ in range(30):
            i = rng.randrange(len(images))
            torch.set_num_threads(rng.choice([1, 2, 3]))
            if not torch.equal(deployed(images[i]), expected[i]):
                different.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not different


def test_call_in_a_forked_process(deployed):
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(in_child(deployed, x), deployed(x))


def test_call_while_signals_arrive(deployed):
    x, seen = torch.randn(1, 3, 64, 64), []
    expected, before = deployed(x), signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        while len(seen) < 20:
            assert torch.equal(deployed(x), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

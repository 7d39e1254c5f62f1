"""`accelerate` on operators of other networks: timm's and transformers' own classes, and lookalikes."""

import copy
import pickle
from functools import partial

import lookalikes_dymn as dymn
import lookalikes_dynamic as dynamic
import pytest
import torch
from tolerance import Errors, largest_error, tolerance
from torch import nn

import mfkernels


def timm_norm(*args, **options):
    return pytest.importorskip("timm.layers.grn").GlobalResponseNorm(*args, **options)


def timm_conv(*args, **options):
    return pytest.importorskip("timm.layers").CondConv2d(*args, **options)


def transformers_norm(*args):
    return pytest.importorskip("transformers.models.convnextv2.modeling_convnextv2").ConvNextV2GRN(*args)


MAP, ROUTING = (3, 16, 12, 9), (3, 4)
CONTEXT = ((3, 8, 1, 1),)  # in a tuple, as a block of DyMN hands it on
# What makes the module, and the shapes of its inputs.
CASES = {
    **{
        f"{kind.__name__}-{conv_type}-{k}": (partial(kind, 16, k=k, conv_type=conv_type), [shape])
        for kind in (dynamic.DyReLUA, dynamic.DyReLUB)
        for conv_type, shape in (("2d", MAP), ("1d", (3, 16, 11)))
        for k in (1, 2, 3)
    },
    "DyReLU": (partial(dynamic.DyReLU, 16), [MAP]),
    "Dynamic_conv2d-1x1": (partial(dynamic.Dynamic_conv2d, 16, 24, 1), [MAP]),
    "Dynamic_conv2d-3x3": (
        partial(dynamic.Dynamic_conv2d, 16, 24, 3, stride=2, padding=1, bias=False),
        [MAP],
    ),
    "Dynamic_conv2d-grouped": (
        partial(dynamic.Dynamic_conv2d, 16, 24, 3, padding=2, dilation=2, groups=4),
        [MAP],
    ),
    "DynamicConv-1x1": (partial(dymn.DynamicConv, 16, 24, 8, 1), [MAP, CONTEXT]),
    "DynamicConv-depthwise": (partial(dymn.DynamicConv, 16, 16, 8, 5, 2, groups=16), [MAP, CONTEXT]),
    "DyReLUB-context-2": (partial(dymn.DyReLUB, 16, 8), [MAP, CONTEXT]),
    "DyReLUB-context-3": (partial(dymn.DyReLUB, 16, 8, M=3), [MAP, CONTEXT]),
    "CoordAtt": (dymn.CoordAtt, [MAP, ((3, 16, 1, 1), (3, 16, 12, 1), (3, 16, 1, 9))]),
    "ContextGen": (partial(dymn.ContextGen, 8, 16, 24, 2), [MAP, MAP]),
    "DY_Block": (partial(dymn.DY_Block, 16, 24, 16, 1), [MAP]),
    "DY_Block-2": (partial(dymn.DY_Block, 16, 24, 32, 2), [MAP]),
}
INSTALLED = {
    "GlobalResponseNorm-last": (partial(timm_norm, 16), [(3, 12, 9, 16)]),
    "GlobalResponseNorm-first": (partial(timm_norm, 16, eps=1e-2, channels_last=False), [MAP]),
    "ConvNextV2GRN": (partial(transformers_norm, 16), [(3, 12, 9, 16)]),
    "CondConv2d-1x1": (partial(timm_conv, 16, 24, 1), [MAP, ROUTING]),
    "CondConv2d-depthwise": (partial(timm_conv, 16, 16, 5, groups=16), [MAP, ROUTING]),
    "CondConv2d-same": (partial(timm_conv, 16, 24, 3, stride=2, padding="same"), [MAP, ROUTING]),
    "CondConv2d-bias": (partial(timm_conv, 16, 24, (3, 5), groups=4, bias=True), [MAP, ROUTING]),
    "CondConv2d-even": (partial(timm_conv, 16, 24, 4, dilation=2, padding="same"), [MAP, ROUTING]),
}
cases = pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.vision) for name in INSTALLED)]
)


def make(case: str, seed: int = 0) -> nn.Module:
    """In a network of one layer, with parameters none of which is zero."""
    torch.manual_seed(seed)
    layer = (CASES | INSTALLED)[case][0]()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return nn.ModuleDict({"layer": layer})


def inputs_of(case: str, seed: int = 1) -> tuple:
    torch.manual_seed(seed + 100)
    return mapped(torch.randn, (CASES | INSTALLED)[case][1])


def mapped(function, values):
    """`function` of each tensor or shape in tuples of them."""
    if isinstance(values, torch.Tensor) or isinstance(values[0], int):
        return function(values)
    return tuple(mapped(function, value) for value in values)


def run(network: nn.Module, inputs: tuple, amp: bool = False) -> dict[str, torch.Tensor]:
    """Results, and the gradients of inputs and parameters."""
    leaves: list[torch.Tensor] = []
    mapped(leaves.append, leaf := mapped(lambda t: t.clone().requires_grad_(), inputs))
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        results = network["layer"](*leaf)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(2)
    sum((r * torch.randn(r.shape, dtype=torch.float64).to(r.dtype)).sum() for r in results).backward()
    found = {f"result {i}": r.detach() for i, r in enumerate(results)}
    found |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    return found | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def accelerated(network: nn.Module) -> nn.Module:
    fast = copy.deepcopy(network)
    report = mfkernels.accelerate(fast)
    assert report.replaced and not report.left, report
    return fast


@cases
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_numbers(case, training, channels_last):
    plain = make(case).double().train(training)
    fast = accelerated(plain)
    inputs = mapped(torch.Tensor.double, inputs_of(case))
    theirs = run(plain, inputs)
    if channels_last:
        inputs = mapped(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t, inputs)
    ours = run(fast, inputs)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-9 * max(1.0, float(value.abs().max()))
        )
    for one, other in zip(plain.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@cases
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_as_exact_as_theirs(case, amp):
    """Results and gradients of inputs, over several draws: an error of theirs can happen to be small.

    Gradients of parameters are sums that cancel, with errors of any size on both sides: those are compared in
    float64, above.
    """
    fast, errors = accelerated(make(case)), Errors()
    for seed in range(4):
        plain, inputs = make(case, seed), inputs_of(case, seed)
        fast.load_state_dict(plain.state_dict())
        truths = run(copy.deepcopy(plain).double(), mapped(torch.Tensor.double, inputs))
        theirs, ours = run(plain, inputs, amp), run(fast, inputs, amp)
        for name, truth in truths.items():
            assert ours[name].dtype == theirs[name].dtype
            if not name.startswith("layer."):
                errors.reference(theirs[name], truth)
                errors.kernel(ours[name], truth)
    errors.check(case)


@cases
def test_nothing_else_changes(case):
    """State, class, copies, pickles, and what `restore` gives back."""
    plain = make(case)
    fast, kind = copy.deepcopy(plain), type(plain["layer"])
    before = dict(fast.named_parameters()) | dict(fast.named_buffers())
    mfkernels.accelerate(fast)
    after = dict(fast.named_parameters()) | dict(fast.named_buffers())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert isinstance(fast["layer"], kind) and type(fast["layer"]) is not kind
    inputs = inputs_of(case)
    expected, exactly = plain["layer"](*inputs), fast.eval()["layer"](*inputs)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(other["layer"](*inputs), exactly, rtol=0, atol=0)
        assert not mfkernels.accelerate(other).replaced
        mfkernels.restore(other)
        assert type(other["layer"]) is kind and not other["layer"].training
        torch.testing.assert_close(other.train()["layer"](*inputs), expected)


@pytest.mark.parametrize("case", ["Dynamic_conv2d-1x1", "DynamicConv-1x1", "DY_Block"])
def test_temperatures_are_still_set_from_outside(case):
    """Training loops look for the class and call a method of it."""
    plain = make(case).eval()
    fast, inputs = accelerated(plain), inputs_of(case)
    first = plain["layer"](*inputs)
    for network in (plain, fast):
        for module in network.modules():
            if isinstance(module, dynamic.Dynamic_conv2d):
                module.update_temperature()
            elif isinstance(module, dymn.DynamicConv):
                module.update_params(epoch=29)
    expected = plain["layer"](*inputs)
    assert not torch.allclose(first, expected)
    torch.testing.assert_close(fast["layer"](*inputs), expected)
    mfkernels.restore(fast)
    torch.testing.assert_close(fast["layer"](*inputs), expected)


def test_other_formulas_are_left_alone():
    class DyReLUB(dynamic.DyReLUB):
        def forward(self, x):
            return super().forward(x).clamp(max=1)

    class CoordAtt(dymn.CoordAtt):
        def forward(self, x, g):
            return super().forward(x, g) + x

    class DynamicConv(dymn.DynamicConv):
        def forward(self, x, g):
            return super().forward(x, g).relu()

    wrong = nn.ModuleDict(dict(a=DyReLUB(8), b=CoordAtt(), c=DynamicConv(8, 8, 8, 3)))
    report = mfkernels.accelerate(wrong)
    assert not report.replaced and [left.path for left in report.left] == ["a", "b", "c"]
    assert all("computes something else" in left.why for left in report.left)


def test_other_structures_are_left_alone():
    """Copies with other attributes are reported; unrelated classes of the same name are not."""
    relu = dynamic.DyReLUA(8)
    del relu.conv_type
    conv = dynamic.Dynamic_conv2d(8, 8, 1)
    conv.weight = nn.Parameter(conv.weight[0].detach())
    unrelated = type("DynamicConv", (nn.Linear,), {})(4, 4)
    report = mfkernels.accelerate(nn.ModuleDict(dict(relu=relu, conv=conv, unrelated=unrelated)))
    assert not report.replaced
    why = {left.path: left.why for left in report.left}
    assert list(why) == ["relu", "conv"]
    assert "no attribute 'conv_type'" in why["relu"] and "does not run" in why["conv"]


@pytest.mark.parametrize("inputs", [32, 512])
def test_dense_convolutions_are_left_where_theirs_is_faster(inputs):
    kinds = dynamic.Dynamic_conv2d(inputs, 8, 3), dymn.DynamicConv(inputs, 8, 8, 3)
    report = mfkernels.accelerate(nn.ModuleList(kinds))
    assert len(report.replaced) == (0 if inputs == 32 else 2)


NETWORKS = {"convnextv2_atto": 12, "convnextv2_tiny": 18, "tf_efficientnet_cc_b0_4e": 24}


@pytest.mark.vision
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    fast = copy.deepcopy(plain)
    report = mfkernels.accelerate(fast)
    kinds = ("GlobalResponseNorm", "CondConv2d")
    assert sum(entry.was in kinds for entry in report.replaced) == NETWORKS[name]
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(x.double())
        limit = tolerance(truth, largest_error(plain(x), truth), torch.float32)
        assert largest_error(fast(x), truth) <= limit

"""Networks deployed with narrow weights against the same networks with rounded weights."""

import copy
import importlib
import pickle

import mobilenets
import pytest
import torch
from test_deploy import DEPLOYABLE, make, plain, small_variant
from test_deploy_dmf_iformer import make_small

import mfkernels
from mfkernels import deploy
from mfkernels.deploy.cpu.rounding import rounded
from mfkernels.models import FeaturePyramid

FORMER = ("no ffn", "two class tokens", "pooled tokens", "dynamic head", "all at once", "spatial-aware")
OTHERS = ("dmf", "dmf, softmax, hot", "iformer", "iformer, projection")
NETWORKS = {
    **{name: lambda name=name: small_variant(dict(DEPLOYABLE[name])) for name in FORMER},
    **{name: lambda name=name: make_small(name) for name in OTHERS},
    "mobilenet v3": lambda: mobilenets.make("v3"),
    "mobilenet, named": lambda: mobilenets.make("named"),
    "mobile_former_26m": lambda: make("mobile_former_26m", num_classes=101),
}
DTYPES = pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8], ids=str)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@DTYPES
@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers(name, weights, instruction_set):
    """As of the rounded network, and not as of the network itself."""
    model = NETWORKS[name]()
    fast, exact, definition = deploy(model, weights=weights), deploy(model), rounded(model, weights)
    channels = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).in_channels
    for batch, height, width in ((1, 64, 64), (3, 37, 51)):
        x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
        expected = plain(definition, x.double())
        limit = 2e-5 if name != "mobile_former_26m" else 1e-4
        assert error(fast(x), expected) < limit < error(exact(x), expected)


@DTYPES
def test_pyramids(weights):
    model = FeaturePyramid(small_variant(dict(token_num=3))).eval()
    x = torch.randn(2, 3, 64, 48)
    expected = plain(rounded(model, weights), x.double())
    got = deploy(model, weights=weights)(x)
    for map_, other in zip(got, expected.values() if isinstance(expected, dict) else expected, strict=True):
        assert error(map_, other) < 2e-5


def test_largest_weights_are_kept():
    """Of int8, of each output; a row of zeros stays one."""
    model = small_variant({})
    model.classifier.classifier[1].weight.data[2] = 0
    before, after = (m.classifier.classifier[1].weight for m in (model, rounded(model, torch.int8)))
    largest = before.abs().amax(1, keepdim=True)
    assert torch.allclose(after.abs().amax(1, keepdim=True), largest.double())
    assert ((after - before).abs() <= largest.double() / 254 * 1.0001).all()
    assert not after[2].any()


@DTYPES
def test_copies_state_and_text(weights):
    model = small_variant({})
    fast, exact = deploy(model, weights=weights), deploy(model)
    x = torch.randn(1, 3, 40, 40)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x))
        other.load_state_dict(fast.state_dict())
    for one, other in ((fast, exact), (exact, fast)):
        with pytest.raises(RuntimeError, match="deploy: weights must be float32 of shape"):
            one.load_state_dict(other.state_dict())
    name = str(weights)[6:]
    assert f", those of linear layers in {name}, a line a step" in str(fast)
    assert f"-> 16, {name}" in str(fast) and name not in str(exact)
    assert fast.weights.numel() < exact.weights.numel()
    assert fast.times(x).keys() == exact.times(x).keys()


def test_bad_arguments(monkeypatch):
    model = small_variant({})
    for bad in (torch.float16, torch.float32, torch.uint8, 8):
        with pytest.raises(ValueError, match=r"weights must be torch\.bfloat16, torch\.int8 or None, got "):
            deploy(model, weights=bad)
    with pytest.raises(ValueError, match=r"unless dtype is torch\.float32 or torch\.int8, got"):
        deploy(model, dtype=torch.bfloat16, weights=torch.int8)
    monkeypatch.setattr(importlib.import_module("mfkernels.deploy"), "_on_gpu", lambda model: True)
    with pytest.raises(ValueError, match=r"weights must be None for a model on a GPU, got torch\.int8"):
        deploy(model, weights=torch.int8)


def test_plans_are_checked():
    fast = deploy(small_variant({}), weights=torch.int8)
    x = torch.randn(1, 3, 40, 40)
    for place, value, message in (
        (1, 1, "narrow is neither 0 nor"),
        (2, 3, "narrow is neither 0 nor"),
        (2, 2, "reads beyond the weights"),
    ):
        plan = fast.plan[3:].tolist()
        plan[place] = value
        sealed = torch.tensor(mfkernels._C.sealed_plan(fast.classes, plan))
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mfkernels.deployed(x, fast.weights, sealed, fast.classes)

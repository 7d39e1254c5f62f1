"""Networks deployed in int8: products of bytes against their definition, and what calibration chooses."""

import copy
import importlib
import pickle

import mobilenets
import pytest
import torch
from conftest import use_instruction_set
from test_deploy import small_variant
from test_deploy_dmf_iformer import make_small
from test_narrow_weights import NETWORKS
from torch import nn

import mfkernels
from mfkernels import _C, deploy
from mfkernels.deploy.cpu import int8
from mfkernels.deploy.cpu.packing import Formats, Rounding
from mfkernels.deploy.cpu.plan import Plan
from mfkernels.deploy.cpu.rounding import product_of_bytes, rounded_inputs
from mfkernels.models import FeaturePyramid

ISAS = ("generic", "avx2", "avx2vnni", "avx512", "avx512vnni", "amx", "dotprod", "i8mm")
ROUNDINGS = {
    "both signs": Rounding(23.7, 101),
    "cut off": Rounding(130.5, 128),
    "positive": Rounding(41.25, 0),
    "negative": Rounding(57.125, 255),
}


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once for each instruction set, those with instructions for int8 among them."""
    yield from use_instruction_set(request.param)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Steps(Plan):
    """Makes plans of single steps, of an image that becomes a map as it is."""

    def __init__(self, channels, rounding):
        super().__init__(nn.Identity(), Formats(rounding={1: rounding, 2: rounding}))
        self.image = nn.Conv2d(channels, channels, 1)
        self.channels = channels
        self.x = self.dense(
            None, self.image, torch.eye(channels).view(channels, channels, 1, 1), torch.zeros(channels)
        )

    def run(self, x, out, stride=1):
        self.hand_out(out)
        words = [*self._header(self.channels, 0, 0), *self.steps]
        plan = torch.tensor(_C.sealed_plan(0, words))
        run = torch.ops.mfkernels.deployed_maps
        return run(x, self.pack.tensor(), plan, [out.channels], [stride], [stride - 1])[0]


@pytest.mark.parametrize("name", ROUNDINGS)
def test_pointwise(name, isa):
    """The same bits as the definition's, of shapes with all rests."""
    for inputs, outputs, height, width, groups in (
        (3, 5, 4, 5, 1),
        (16, 16, 1, 1, 1),
        (33, 70, 7, 9, 1),
        (300, 40, 3, 2, 1),
        (24, 48, 9, 15, 4),
        (6, 6, 5, 5, 3),
    ):
        x = torch.randn(2, inputs, height, width, generator=generator(inputs))
        weight = torch.randn(outputs, inputs // groups, generator=generator(1))
        steps = Steps(inputs, ROUNDINGS[name])
        linear = steps.pack.map_linear(weight, groups=groups)
        got = steps.run(x, steps.pointwise(steps.x, outputs, linear, groups=groups))
        expected = product_of_bytes(x, weight[:, :, None, None], ROUNDINGS[name], groups=groups)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 2), (7, 1)])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_dense_conv(name, kernel, stride, isa):
    """What lies around a map is zero, which is the byte `zero`."""
    for inputs, outputs, height, width, groups in (
        (3, 5, 9, 11, 1),
        (16, 20, 30, 29, 1),
        (20, 16, 1, 1, 1),
        (32, 16, 70, 8, 1),
        (6, 12, 5, 7, 3),
        (64, 32, 9, 8, 2),
        (42, 70, 6, 5, 14),
    ):
        x = torch.randn(2, inputs, height, width, generator=generator(inputs))
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        weight = torch.randn(conv.weight.shape, generator=generator(1))
        steps = Steps(inputs, ROUNDINGS[name])
        got = steps.run(x, steps.dense(steps.x, conv, weight, torch.zeros(outputs)), stride)
        numbers = dict(stride=stride, padding=kernel // 2, groups=groups)
        expected = product_of_bytes(x, weight, ROUNDINGS[name], **numbers)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("inputs", [16, 24])
def test_padding_of_tensorflow(inputs, isa):
    """Of even and odd sizes: the smaller half of the zeros lies before the map."""
    weight = torch.randn(20, inputs, 4, 4, generator=generator(1))
    rounding, conv = ROUNDINGS["both signs"], mobilenets.Conv2dSame(inputs, 20, 4, 3)
    for height, width in ((9, 10), (11, 12), (1, 2)):
        x = torch.randn(2, inputs, height, width, generator=generator(inputs))
        steps = Steps(inputs, rounding)
        got = steps.run(x, steps.dense(steps.x, conv, weight, torch.zeros(20)), 3)
        above, left = (max((-(-size // 3) - 1) * 3 + 4 - size, 0) // 2 for size in (height, width))
        around = nn.functional.pad(x, (left, 4 - left, above, 4 - above))
        expected = product_of_bytes(around, weight, rounding, stride=3)
        assert torch.equal(got, expected[..., : got.shape[2], : got.shape[3]])


def test_largest_sums(isa):
    """No product and no sum is cut off, where all are as large as they can be."""
    for sign in (1, -1):
        x, weight = torch.full((1, 2048, 3, 5), 2.0), torch.full((32, 2048), 1.5 * sign)
        steps = Steps(2048, Rounding(127.5, 0))
        got = steps.run(x, steps.pointwise(steps.x, 32, steps.pack.map_linear(weight)))
        assert torch.equal(got, product_of_bytes(x, weight[:, :, None, None], Rounding(127.5, 0)))
        assert torch.allclose(got, torch.full_like(got, 3.0 * sign * 2048))


def test_inverted(isa):
    """Bytes between both products: a few may be others, by one, since GELU is not the same to the bit."""
    x = torch.randn(1, 24, 10, 13, generator=generator())
    expand, project = (torch.randn(*shape, generator=generator(1)) for shape in ((96, 24), (24, 96)))
    rounding = Rounding(25.0, 60)
    steps = Steps(24, rounding)
    packed = [steps.pack.map_linear(weight) for weight in (expand, project)]
    got = steps.run(x, steps.inverted(steps.x, 0, 0, 0, *packed))
    hidden = nn.functional.gelu(product_of_bytes(x, expand[:, :, None, None], rounding))
    expected = x + product_of_bytes(hidden, project[:, :, None, None], rounding)
    step = project.abs().max() / rounding.scale
    assert ((got - expected).abs() <= 2.01 * step).all()
    assert ((got - expected).abs() > 1e-4).float().mean() < 0.01


def test_definition():
    """Products of integers are those of the rounded numbers."""
    x, weight = (
        torch.randn(2, 8, 5, 5, generator=generator()),
        torch.randn(4, 8, 3, 3, generator=generator(1)),
    )
    rounding = Rounding(30.0, 100)
    numbers = rounded_inputs(x, rounding).double() / rounding.scale
    assert ((numbers - x.clamp(-100 / 30, 155 / 30)).abs() <= 0.5 / 30 + 1e-6).all()
    factor = weight.flatten(1).abs().amax(1).double().view(-1, 1, 1, 1) / 127
    rounded_weight = (weight.double() / factor).round() * factor
    expected = nn.functional.conv2d(numbers, rounded_weight, padding=1)
    got = product_of_bytes(x, weight, rounding, padding=1)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def images(model, count=4, seed=0):
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(count, channels, 48, 40, generator=generator(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    compare(name)


@pytest.mark.parametrize("name", ["no ffn", "iformer", "mobilenet v3"])
def test_networks_on_all_processors(name, isa):
    compare(name)


def compare(name):
    """Results are near those of float32 on other images, too, but not the same; again: the same bits."""
    model = NETWORKS[name]()
    exact, calibration = deploy(model), images(model)
    fast = deploy(model, dtype=torch.int8, calibration=calibration)
    assert 0 < fast.error <= int8.BUDGET
    assert any(block.dtype == torch.int8 for block in fast.blocks)
    x = images(model, 3, seed=5)
    got, expected = fast(x), exact(x)
    assert int8._error([got.double()], [expected.double()]) < 3 * int8.BUDGET
    assert not torch.equal(got, expected)
    assert torch.equal(fast(x), got)
    assert torch.allclose(fast(x[:1]), got[:1], rtol=1e-5, atol=1e-5 * got.abs().max().item())


def test_parts_that_lose_too_much_stay_in_float(monkeypatch):
    model = make_small("iformer")
    calibration = images(model)
    chosen = []
    for budget in (1.0, 0.02, 0.0):
        monkeypatch.setattr(int8, "BUDGET", budget)
        fast = deploy(model, dtype=torch.int8, calibration=calibration)
        assert fast.error <= budget
        chosen.append({block.part for block in fast.blocks if block.dtype == torch.int8})
        errors = {block.part: block.error for block in fast.blocks}
        others = errors.keys() - chosen[-1]
        assert (
            not others or not chosen[-1] or max(map(errors.get, chosen[-1])) <= min(map(errors.get, others))
        )
    assert chosen[0] == errors.keys() and chosen[0] > chosen[1] > chosen[2] == set()
    assert torch.equal(fast(calibration), deploy(model)(calibration))


def test_ranges_have_the_least_error():
    """Of ten million numbers of which one is far off: that is cut off."""
    numbers = torch.randn(100_000, generator=generator()).double()
    low, high = numbers.min().item(), 60.0
    counts = 100 * torch.histc(numbers, int8.BINS, low, high)
    counts[-1] += 1
    best = int8._best(torch.tensor([low, high]), counts)

    def error(rounding):
        found = rounded_inputs(torch.cat([numbers, torch.tensor([high])]).float(), rounding) / rounding.scale
        squares = (found.double() - torch.cat([numbers, torch.tensor([high])])) ** 2
        return (100 * squares[:-1].sum() + squares[-1]).item()

    span = (high - low) / 255
    assert error(best) < 0.3 * error(Rounding(1 / span, round(-low / span)))


def test_pyramids_and_weights():
    model = FeaturePyramid(small_variant(dict(token_num=3))).eval()
    calibration = images(model)
    exact = deploy(model)(calibration)
    for weights in (None, torch.bfloat16):
        fast = deploy(model, dtype=torch.int8, calibration=calibration, weights=weights)
        for got, expected in zip(fast(calibration), exact, strict=True):
            assert got.shape == expected.shape
            assert 0 < (got - expected).abs().max() < 0.3 * expected.abs().max()


def test_batches_as_of_a_data_loader():
    model = small_variant({})
    calibration = images(model)
    whole = deploy(model, dtype=torch.int8, calibration=calibration)
    data = torch.utils.data.TensorDataset(calibration, torch.arange(4))
    for batches in (torch.utils.data.DataLoader(data, batch_size=3), iter(calibration.split(1))):
        fast = deploy(model, dtype=torch.int8, calibration=batches)
        assert torch.equal(fast(calibration), whole(calibration))


def test_copies_state_and_text():
    model = small_variant({})
    calibration = images(model)
    fast, exact = deploy(model, dtype=torch.int8, calibration=calibration), deploy(model)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(calibration), fast(calibration))
        assert other.blocks == fast.blocks
        other.load_state_dict(fast.state_dict())
    with pytest.raises(RuntimeError, match="deploy: weights must be float32 of shape"):
        exact.load_state_dict(fast.state_dict())
    assert "int8" in str(fast) and "int8" not in str(exact)
    assert fast.weights.numel() < exact.weights.numel()
    report = fast.report(calibration[:1])
    assert all(block.part in report for block in fast.blocks) and "precision" in report
    with pytest.raises(ValueError, match="a report needs a network in int8"):
        exact.report(calibration[:1])


def test_bad_arguments(monkeypatch):
    model = small_variant({})
    good = images(model)
    for bad, kind, message in (
        (None, ValueError, r"calibration must be given with torch\.int8 and with nothing else, got none"),
        (3, TypeError, "calibration must be a tensor or batches of images, got int"),
        ([3], TypeError, "calibration must be a tensor, got int"),
        ([], ValueError, "calibration must have at least one image, got none"),
        (good[:0], ValueError, "calibration must have at least one image, got none"),
        (good[0], ValueError, "calibration must"),
        (good[:, :2], ValueError, "x must have shape"),
        (good * torch.nan, ValueError, "calibration leads to numbers that are not finite"),
        (good * torch.inf, ValueError, "calibration leads to numbers that are not finite"),
    ):
        with pytest.raises(kind, match=message):
            deploy(model, dtype=torch.int8, calibration=bad)
    with pytest.raises(ValueError, match=r"and with nothing else, got some and torch\.float32"):
        deploy(model, calibration=good)
    monkeypatch.setattr(importlib.import_module("mfkernels.deploy"), "_on_gpu", lambda model: True)
    with pytest.raises(
        TypeError, match=r"dtype must be torch\.float32, torch\.bfloat16 or torch\.float16, got"
    ):
        deploy(model, dtype=torch.int8, calibration=good)


def test_plans_are_checked():
    """Roundings that cannot be, and int8 matrices where no step takes them."""
    fast = deploy(make_small("iformer"), dtype=torch.int8, calibration=images(make_small("iformer")))
    x = images(make_small("iformer"), 1)
    plan = fast.plan[3:].tolist()
    places = [i for i, word in enumerate(plan) if word > 1 << 29 and 0 <= plan[i + 1] < 256]
    bits = torch.tensor([torch.inf, -1.0, torch.nan]).view(torch.int32).tolist()
    assert places
    for place, value in (
        (3, 0),
        (3, 2),
        *((places[0], b) for b in bits),
        (places[0], 1 << 40),
        (places[0] + 1, 256),
    ):
        words = list(plan)
        words[place] = value
        sealed = torch.tensor(_C.sealed_plan(fast.classes, words))
        with pytest.raises(
            RuntimeError, match=r"int8 is neither 0 nor 1|rounds its inputs in a way it may not"
        ):
            torch.ops.mfkernels.deployed(x, fast.weights, sealed, fast.classes)


def test_numbers_that_are_not_finite_become_bytes():
    """They do not pass, as is said; others are as they were."""
    model = mobilenets.make("v3")
    fast = deploy(model, dtype=torch.int8, calibration=images(model))
    x = images(model, 2)
    x[1, 0, 3, 3] = torch.nan
    assert torch.allclose(fast(x)[0], fast(x[:1])[0], atol=1e-5)
    assert fast(x).isfinite().all()


def test_instruction_sets_are_there():
    assert set(mfkernels.native.ISAS) == set(ISAS)

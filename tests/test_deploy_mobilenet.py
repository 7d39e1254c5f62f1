"""Deployed MobileNets against the networks that they were made of."""

import copy
import pickle

import pytest
import torch
from mobilenets import NETWORKS, Backbone, Inverted, conv, make
from test_deploy import BF16, check_numbers, plain, truth
from threads import on_threads
from torch import nn

import mfkernels
from mfkernels.bench.run import rivals

SIZES = ((2, 64, 64), (1, 37, 51), (1, 1, 1), (3, 7, 90))


def image(model: nn.Module, *size: int) -> torch.Tensor:
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(size[0], channels, *size[1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers(name, instruction_set):
    model = make(name)
    deployed = mfkernels.deploy(model)
    for size in SIZES:
        x = image(model, *size)
        expected = truth(model, x)
        assert (deployed(x) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_mobilenet_v3_large():
    torch.manual_seed(0)
    check_numbers(rivals()["mobilenet_v3_large"](101).eval(), ((1, 224, 224), (2, 65, 97)), "rival")


@BF16
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16(name):
    model = make(name)
    deployed, rounded = mfkernels.deploy(model, dtype=torch.bfloat16), copy.deepcopy(model).bfloat16()
    ours, reference = [], []
    for _ in range(8):
        x = image(model, 2, 64, 48).bfloat16()
        expected = truth(model, x)
        ours.append((deployed(x.float()) - expected).abs().max())
        reference.append((plain(rounded, x) - expected).abs().max())
    assert max(ours) <= 2 * max(reference)


@pytest.mark.parametrize("name", ["v3", "efficient", "efficient, same", "residual"])
def test_maps(name, instruction_set):
    model = Backbone(make(name), (4, 0, 2)).eval()
    deployed = mfkernels.deploy(model)
    maps = truth(model, image(model, 1, 64, 64))
    info = deployed.feature_info
    assert info.channels() == [m.shape[1] for m in maps] and info.reduction() == [
        64 // m.shape[2] for m in maps
    ]
    for size in SIZES:
        x = image(model, *size)
        expected = truth(model, x)
        for one, other in zip(deployed(x), expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() < 2e-5 * other.abs().max()


class Doubling(Backbone):
    """Looks like the chain, and computes something else."""

    def forward(self, x):
        return super().forward(2 * x + 1)


class Halved(Backbone):
    """Returns something else than the maps of its parts."""

    def forward(self, x):
        return [y / 2 for y in super().forward(x)]


def test_other_maps_are_named():
    for kind in (Halved, Doubling):
        with pytest.raises(
            ValueError, match=f"deploy: the model \\({kind.__name__}\\) .*something else than"
        ):
            mfkernels.deploy(kind(make("v3"), (0, 2)).eval())


def test_threads_strides_and_copies():
    model = make("v3")
    deployed, x = mfkernels.deploy(model), torch.randn(5, 3, 150, 130)
    results = on_threads(lambda: deployed(x))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(deployed(x.contiguous(memory_format=torch.channels_last)), results[0])
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), results[0])
    assert not deployed(torch.full((1, 3, 64, 64), float("nan"))).isfinite().any()
    assert torch.equal(deployed(x), results[0])


def test_the_model_is_left_alone():
    model = make("v3")
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    mfkernels.deploy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_its_parts_are_named():
    text = str(mfkernels.deploy(make("v3")))
    for part in ("features.0.0", "features.1", "pool", "classifier.0", "classifier.3"):
        assert f"  {part} " in text
    assert ", hardsigmoid" in text and ", 5x5, relu" in text
    text = str(mfkernels.deploy(make("efficient")))
    assert ", sigmoid" in text and ", 5x5, silu" in text


class Doubled(Inverted):
    """Looks like the block and computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Halves(nn.Module):
    """Its convolution reads half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(10, 10, 3, padding=1)

    def forward(self, x):
        one, other = x.chunk(2, 1)
        return torch.cat([one, self.conv(other)], 1)


def broken(kind: str) -> nn.Module:
    model = make("v3")
    if kind == "hook":
        model.features[2].register_forward_hook(lambda *_: None)
    elif kind == "dilation":
        model.features[2].block[1][0].dilation = (2, 2)
    elif kind == "padding":
        model.features[3].block[0][0].padding = (1, 1)
    elif kind == "other":
        model.features[3] = Doubled(20, 20, 36, 5, 1, nn.Hardswish).eval()
    elif kind == "halves":
        model.features[3] = Halves()
    elif kind == "groups of the image":
        model.features[0][0] = nn.Conv2d(3, 12, 3, 2, 1, groups=3)
    elif kind == "rounded up":
        model.features[2] = nn.Sequential(model.features[2], nn.MaxPool2d(2, ceil_mode=True))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hook", r"features\.2 \(Inverted\): has a forward hook"),
        ("dilation", r"features\.2\.block\.1\.0 \(Conv2d\): only convolutions without dilation"),
        ("padding", r"features\.3\.block\.0\.0 \(Conv2d\): only dense convolutions of squares up to 15x15"),
        ("other", r"the model \(Chain\) computes something else"),
        ("halves", r"the model \(Chain\) computes something else"),
        ("groups of the image", r"features\.0\.0 \(Conv2d\): only convolutions of the image without groups"),
        ("rounded up", r"features\.2\.1 \(MaxPool2d\): only poolings of squares up to 15x15, rounded down"),
    ],
)
def test_what_is_not_known_is_named(kind, message):
    with pytest.raises(ValueError, match=f"deploy: {message}"):
        mfkernels.deploy(broken(kind))


def test_other_networks_are_no_chains():
    other = nn.Sequential(
        conv(3, 8, 3, 2, act=nn.Mish), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with pytest.raises(TypeError, match=r"deploy: model must be a MobileFormer or .*, got Sequential"):
        mfkernels.deploy(other.eval())

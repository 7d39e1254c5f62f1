"""Deployed pyramids against the networks that they were made of."""

import copy
import pickle

import pytest
import torch
from test_deploy import BF16, plain, truth
from test_deploy_dmf_iformer import NESTED, TYPES, WINDOWED, small_dmf, small_iformer
from threads import on_threads

import mfkernels
from mfkernels.bench.run import randomise
from mfkernels.models import FeaturePyramid, MobileFormer, create_model

ROWS = [
    ("D", 2, 10, 1, 1, 0),
    ("D", 3, 12, 1, 2, 4),
    ("M", 3, 12, 1, 1, 3),
    ("D", 2, 20, 1, 2, 2),
    ("M", 2, 20, 2, 1, 2),
]
SMALL = {
    "mobile_former": lambda: MobileFormer(
        ROWS, num_classes=7, stem_channels=8, token_dim=64, token_num=3, features=40
    ),
    "mobile_former, spatial-aware": lambda: MobileFormer(
        ROWS[:-1], num_classes=7, stem_channels=8, token_dim=64, token_num=3, features=40, token_id=-1
    ),
    "dmf": lambda: small_dmf(),
    "iformer": lambda: small_iformer(),
    "iformer, windows": lambda: small_iformer(WINDOWED),
    "iformer, windows at the end": lambda: small_iformer(
        (*TYPES[:7], "SHMABlock_r1_hdrr2_nh1_ws4_wsp1_wre1")
    ),
    "iformer, one size": lambda: small_iformer(downsample=False, dims=(16,) * 4),
    "iformer, fused": lambda: small_iformer().eval().fuse(),
    "iformer, five channels": lambda: small_iformer(in_channels=5),
    "iformer, windows in windows": lambda: small_iformer(NESTED),
    "iformer, layer norms": lambda: small_iformer(norm="layer"),
    "iformer, ConvNeXt's stem": lambda: small_iformer(stem="ConvNeXt"),
    "iformer, as ConvNeXt": lambda: small_iformer(norm="layer", stem="ConvNeXt"),
}
small = pytest.mark.parametrize("name", ["mobile_former", "dmf", "iformer, windows"])


def make(name: str, out_indices=None) -> FeaturePyramid:
    torch.manual_seed(0)
    model = SMALL[name]() if name in SMALL else create_model(name)
    if "fused" not in name:
        randomise(model, torch.randn(4, model.in_channels, 64, 64))
    return FeaturePyramid(model, out_indices).eval()


def check(maps, expected) -> None:
    assert isinstance(maps, list) and len(maps) == len(expected)
    for one, other in zip(maps, expected, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        assert (one - other).abs().max() < 2e-5 * other.abs().max()


@pytest.mark.parametrize("name", [*SMALL, "mobile_former_26m", "dmf_96", "iformer_t"])
def test_same_maps(name, instruction_set):
    if name not in SMALL and instruction_set != mfkernels.native.instruction_set():
        pytest.skip("large ones by one instruction set")
    pyramid = make(name)
    deployed = mfkernels.deploy(pyramid)
    unpadded = "layer norms" in name or "ConvNeXt" in name
    for size in ((2, 64, 64), (1, 37, 51), *(((1, 70, 93),) if unpadded else ((1, 1, 1), (3, 7, 90)))):
        x = torch.randn(size[0], pyramid.in_channels, *size[1:])
        check(deployed(x), truth(pyramid, x))
        without_numbers = copy.deepcopy(deployed).to("meta")(x.to("meta"))
        assert [m.shape for m in without_numbers] == [m.shape for m in deployed(x)]


@small
@pytest.mark.parametrize("out_indices", [(0,), (-1,), (1, 0), 1])
def test_some_of_the_maps_in_any_order(name, out_indices):
    pyramid = make(name, out_indices)
    deployed = mfkernels.deploy(pyramid)
    x = torch.randn(2, 3, 40, 48)
    check(deployed(x), truth(pyramid, x))
    info = deployed.feature_info
    assert [m.shape[1] for m in deployed(x)] == info.channels() == pyramid.feature_info.channels()
    assert info.out_indices == pyramid.feature_info.out_indices and len(info) == len(pyramid.feature_info)


@pytest.mark.parametrize("name", ["mobile_former", "dmf", "iformer"])
def test_what_comes_after_the_last_map_is_not_there(name):
    few, every = (mfkernels.deploy(make(name, out_indices)) for out_indices in ((0,), None))
    assert few.weights.numel() < every.weights.numel() and few.plan.numel() < every.plan.numel()


@small
def test_batches_strides_and_threads(name):
    deployed = mfkernels.deploy(make(name))
    x = torch.randn(5, 3, 150, 130)
    results = on_threads(lambda: deployed(x))
    assert all(torch.equal(a, b) for maps in results for a, b in zip(maps, results[0], strict=True))
    for a, b in zip(deployed(x.contiguous(memory_format=torch.channels_last)), results[0], strict=True):
        assert torch.equal(a, b) and a.is_contiguous(memory_format=torch.channels_last)
    turned = deployed(x.transpose(2, 3).contiguous().transpose(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(turned, results[0], strict=True))
    one_by_one = [deployed(image[None]) for image in x]
    for i, together in enumerate(results[0]):
        torch.testing.assert_close(
            torch.cat([maps[i] for maps in one_by_one]), together, rtol=1e-5, atol=1e-5
        )
    assert [m.shape[0] for m in deployed(x[:0])] == [0] * len(results[0])
    assert all(not m.isfinite().any() for m in deployed(torch.full((1, 3, 64, 64), float("nan"))))
    assert all(torch.equal(a, b) for a, b in zip(deployed(x), results[0], strict=True))


@small
def test_copies_and_pickles(name):
    deployed = mfkernels.deploy(make(name, (1, 0)))
    x = torch.randn(2, 3, 40, 48)
    expected = deployed(x)
    for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
        assert other.feature_info.get_dicts() == deployed.feature_info.get_dicts()


@small
def test_export_and_opcheck(name):
    """As of any network that halves its maps, PyTorch exports no sizes for which one of them has one row."""
    deployed = mfkernels.deploy(make(name, (1, 0)))
    x = torch.randn(2, 3, 40, 48)
    height, width = (torch.export.Dim(side, min=33) for side in ("height", "width"))
    sizes = {0: torch.export.Dim("batch"), 2: height, 3: width}
    program = torch.export.export(deployed, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(3, 3, 33, 64)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(other), deployed(other), strict=True))
    operator = torch.ops.mfkernels.deployed_maps.default
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        numbers = deployed._channels, deployed._reductions, deployed._margins
        arguments = (image, deployed.weights, deployed.plan, *numbers)
        torch.library.opcheck(operator, arguments)


@small
def test_other_channels_and_other_operators_are_an_error(name):
    pyramid = make(name)
    deployed, scores = mfkernels.deploy(pyramid), mfkernels.deploy(scored(name))
    maps = torch.ops.mfkernels.deployed_maps
    x, channels, reductions = torch.randn(1, 3, 33, 32), deployed._channels, deployed._reductions
    made, margins = (deployed.weights, deployed.plan), deployed._margins
    for wrong in (
        (channels[1:], reductions, margins),
        ([channels[0] + 1, *channels[1:]], reductions, margins),
        (channels, [0, *reductions[1:]], margins),
        (channels, [2 * r for r in reductions], margins),
        (channels, reductions, [0] * len(margins)),
        (channels, reductions, [1 << 62] * len(margins)),
        (channels, reductions, margins[1:]),
        ([], [], []),
    ):
        with pytest.raises(RuntimeError, match="channels, reductions and margins must be those of the plan"):
            maps(x, *made, *wrong)
    with pytest.raises(RuntimeError, match="deploy: "):
        maps(x, scores.weights, scores.plan, channels, reductions, margins)
    one = torch.ops.mfkernels.deployed
    for classes in (0, 1, -1, 7):
        with pytest.raises(RuntimeError, match="deploy: "):
            one(x, *made, classes)


def scored(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return SMALL[name]().eval()


def test_bad_images_and_networks():
    deployed = mfkernels.deploy(make("iformer"))
    with pytest.raises(ValueError, match=r"deploy: x must have shape \(B, 3, H, W\)"):
        deployed(torch.zeros(1, 4, 8, 8))
    with pytest.raises(TypeError, match=r"deploy: x must be a float32 tensor"):
        deployed(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be in eval mode"):
        mfkernels.deploy(make("iformer").train())
    hooked = make("dmf")
    hooked.network.blocks[1].former.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"deploy: blocks\.1\.former .*: has a forward hook"):
        mfkernels.deploy(hooked)


@small
def test_verify_and_times(name):
    pyramid = make(name)
    deployed = mfkernels.deploy(pyramid)
    assert mfkernels.verify(pyramid, deployed, [torch.randn(2, 3, 64, 64) for _ in range(4)]).passed
    times = deployed.times(torch.randn(1, 3, 64, 64))
    assert all(seconds > 0 for seconds in times.values())
    last = pyramid.feature_info.module_name()[-1]
    assert any(part.startswith(last) for part in times)


@BF16
@small
def test_bfloat16(name):
    pyramid = make(name)
    deployed, rounded = mfkernels.deploy(pyramid, dtype=torch.bfloat16), copy.deepcopy(pyramid).bfloat16()
    for seed in range(4):
        x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(seed)).bfloat16()
        triples = zip(deployed(x), plain(rounded, x), truth(pyramid, x), strict=True)
        for ours, reference, expected in triples:
            assert ours.dtype == torch.bfloat16
            assert (ours - expected).abs().max() <= 2 * (reference - expected).abs().max()

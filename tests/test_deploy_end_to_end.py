"""The deployed end-to-end detector against the module that it was made of."""

import copy
import pickle

import pytest
import torch
from test_deploy import BF16, plain, truth
from threads import on_threads
from tolerance import MeanErrors

import mfkernels
from mfkernels.models import Detections, EndToEndMobileFormer, FeaturePyramid, MobileFormer, create_model

ROWS = [("D", 2, 8, 1, 1, 0), *(("D", 3, width, 1, 2, 2) for width in (12, 16, 24, 32))]
VARIANTS = {
    "two scales": {},
    "slopes of one token": dict(spatial=False),
    "four scales": dict(blocks=(1, 1, 1, 1), mobile_attention=False),
    "one scale": dict(blocks=(1,)),
    "channels that are padded": dict(channels=40, num_heads=4),
    "three heads of bridges": dict(channels=24, num_heads=2, bridge_heads=3),
    "one head in Mobile": dict(num_heads=1),
    "positions as they are": dict(adapt_position=False),
    "no gates": dict(gate=False, token_id=3),
    "as wide as the paper's": dict(expansion=6, queries=100, channels=64, num_heads=8),
}
SIZES = ((2, 64, 64), (1, 97, 131), (1, 1, 1), (1, 33, 7), (3, 40, 50))


def small(**options) -> EndToEndMobileFormer:
    torch.manual_seed(0)
    token_id = -1 if options.pop("spatial", True) else 0
    network = MobileFormer(ROWS, stem_channels=8, token_dim=32, token_num=3, token_id=token_id)
    settings = dict(num_classes=6, queries=5, channels=32, num_heads=4, expansion=2) | options
    blocks = settings.pop("blocks", (2, 1))
    return randomised(EndToEndMobileFormer(FeaturePyramid(network), blocks, **settings))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """With layers that are not what they begin as."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        elif "bias" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
    return model.eval()


def image(seed: int, batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def check(model: torch.nn.Module, sizes) -> None:
    deployed, errors = mfkernels.deploy(model), MeanErrors()
    for seed, size in enumerate(sizes):
        x = image(seed, *size)
        expected, reference, found = truth(model, x), plain(model, x), deployed(x)
        assert isinstance(found, Detections) and found.auxiliary == ()
        for value, of_plain, exact in zip(found[:2], reference[:2], expected[:2], strict=True):
            assert value.shape == exact.shape
            errors.reference(of_plain, exact)
            errors.kernel(value, exact)
            assert (value - exact).abs().max() < 1e-4 * max(exact.abs().max(), 1)
    errors.check(type(model).__name__)


@pytest.mark.parametrize("name", VARIANTS)
def test_same_detections(name, instruction_set):
    check(small(**VARIANTS[name]), SIZES)


@pytest.mark.parametrize("name", ["e2e_mobile_former_151m", "e2e_mobile_former_508m"])
def test_same_detections_of_the_papers(name):
    torch.manual_seed(0)
    check(randomised(create_model(name)), ((1, 96, 128), (2, 64, 75)))


@BF16
@pytest.mark.parametrize("name", ["two scales", "as wide as the paper's"])
def test_bfloat16(name, bf16_instruction_set):
    """At most twice the error of the plain detector in bfloat16, over all images."""
    model = small(**VARIANTS[name])
    deployed, rounded = mfkernels.deploy(model, dtype=torch.bfloat16), copy.deepcopy(model).bfloat16()
    ours, reference = [], []
    for seed in range(4):
        x = image(seed, 2, 64, 96).bfloat16()
        triples = zip(deployed(x)[:2], plain(rounded, x)[:2], truth(model, x)[:2], strict=True)
        for value, of_plain, exact in triples:
            assert value.dtype == torch.bfloat16
            ours.append((value - exact).abs().max())
            reference.append((of_plain - exact).abs().max())
    assert sum(ours) <= 2 * sum(reference)


@pytest.mark.parametrize("weights", [torch.int8, torch.bfloat16])
def test_narrow_weights(weights):
    model = small(**VARIANTS["as wide as the paper's"])
    narrow, deployed = mfkernels.deploy(model, weights=weights), mfkernels.deploy(model)
    assert narrow.weights.numel() < deployed.weights.numel()
    x = image(0, 1, 64, 64)
    for value, expected in zip(narrow(x)[:2], deployed(x)[:2], strict=True):
        assert 0 < (value - expected).abs().max() < 0.2 * expected.abs().max()


def test_threads_copies_pickles_and_strides():
    deployed = mfkernels.deploy(small())
    x = image(0, 3, 150, 130)
    first, *others = on_threads(lambda: deployed(x))
    others += [deployed(x.contiguous(memory_format=torch.channels_last))]
    others += [copy.deepcopy(deployed)(x), pickle.loads(pickle.dumps(deployed))(x)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(other[:2], first[:2], strict=True))
    one_by_one = [deployed(one[None]) for one in x]
    torch.testing.assert_close(torch.cat([one.logits for one in one_by_one]), first.logits)
    empty = deployed(x[:0])
    assert empty.logits.shape == (0, 5, 7) and empty.boxes.shape == (0, 5, 4)


def test_times_and_what_is_printed():
    deployed = mfkernels.deploy(small())
    times = deployed.times(image(0, 1, 64, 64))
    parts = ("scales.0.0", "scales.0.0 pixels", "scales.1.0 tokens", "up_convs.0", "classify", "locate")
    assert all(times[part] > 0 for part in parts)
    text = str(deployed)
    assert "rows -> map" in text and "bilinear_by_two" in text and "dynamic_lite" in text


def test_exported():
    deployed = mfkernels.deploy(small())
    x = image(0, 2, 64, 64)
    sides = {2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    shapes = ({0: torch.export.Dim("batch"), **sides},)
    program = torch.export.export(deployed, (x,), dynamic_shapes=shapes)
    other = image(1, 3, 40, 70)
    for value, expected in zip(program.module()(other)[:2], deployed(other)[:2], strict=True):
        assert torch.equal(value, expected)


def test_what_cannot_be_deployed_is_named():
    deployed = mfkernels.deploy(small())
    x = image(0, 1, 64, 64)
    with pytest.raises(ValueError, match="deploy: mask must be None"):
        deployed(x, torch.zeros(1, 64, 64) > 0)
    with pytest.raises(ValueError, match=r"deploy: x must have shape \(B, 3, H, W\)"):
        deployed(x[:, :2])
    with pytest.raises(ValueError, match=r"scales\.0\.0 \(DetectionBlock\): only blocks whose Mobile comes"):
        mfkernels.deploy(small(mobile_first=False))
    hooked = small()
    hooked.scales[1][0].global_block.ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"scales\.1\.0\.global_block\.ffn .*: has a forward hook"):
        mfkernels.deploy(hooked)
    other = small()
    other.up_convs[0] = torch.nn.Identity().eval()
    with pytest.raises(ValueError, match=r"up_convs\.0 \(Identity\): unknown to deploy"):
        mfkernels.deploy(other)
    with pytest.raises(ValueError, match="must be in eval mode"):
        mfkernels.deploy(small().train())

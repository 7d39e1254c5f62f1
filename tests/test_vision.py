"""Networks and users of other libraries: timm's iFormer, transformers' TimmBackbone, torchvision's detectors.

Most of it needs an environment with these libraries: `make vision`.
"""

import copy
import subprocess
import sys

import pytest
import torch
from test_deploy import check_numbers, truth
from torch import nn

import mfkernels
from mfkernels.bench.run import randomise
from mfkernels.models import create_model, load_released

pytestmark = pytest.mark.vision
RELEASED = (
    *(f"iformer_{size}" for size in ("t", "s", "m", "l", "l2", "h")),
    *(f"iformer_{size}_distilled" for size in ("m", "l", "l2")),
)
SMALL = dict(
    dims=(8, 12, 16, 20), depths=(1, 2, 5, 3), attn_groups=(0, 0, 1, 1), attn_head_dim_reduction=(0, 0, 2, 4)
)


@pytest.fixture(scope="module")
def timm():
    timm = pytest.importorskip("timm")
    if "iformer_m_distilled" not in timm.list_models():
        pytest.skip("this timm has no iFormer")
    return timm


def with_statistics(model: nn.Module, channels: int = 3) -> nn.Module:
    """Norms that are not what they begin as."""
    randomise(model, torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0)))
    return model


def make(timm, name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=options.pop("num_classes", 5), **options)
    return with_statistics(model, options.get("in_chans", 3)).eval()


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of training, the gradients, the statistics, and of inference."""
    out = model.train()(x)
    out.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return [out.detach(), *gradients, *(b.double() for b in model.buffers()), model.eval()(x).detach()]


@pytest.mark.parametrize("name", RELEASED)
def test_accelerated_in_training_and_in_inference(timm, name):
    plain = make(timm, name).double()
    fast = copy.deepcopy(plain)
    before = dict(fast.named_parameters())
    report = mfkernels.accelerate(fast)
    assert not report.left
    assert not [m for m in fast.modules() if type(m).__name__ in ("SHMA", "ConvNorm", "Stem")]
    assert {r.was for r in report.replaced} == {"SHMA", "ConvNorm", "Stem", "Sequential"}
    after = dict(fast.named_parameters())
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    x = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    for one, other in zip(results(plain, x), results(fast, x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * max(1.0, one.abs().max().item()))
    mfkernels.restore(fast)
    assert type(fast.stem).__name__ == "Stem" and list(fast.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", RELEASED)
def test_deployed_verified_and_loaded(timm, name):
    plain = make(timm, name)
    x = torch.randn(8, 3, 65, 47)  # of few results the largest error is a matter of luck
    deployed = mfkernels.deploy(plain)
    assert mfkernels.verify(plain, deployed, x).passed
    x = x[:2]
    ours = create_model(name.removesuffix("_distilled"), num_classes=5, distillation="distilled" in name)
    load_released(ours, {"model": plain.state_dict()})
    with torch.inference_mode():
        expected = plain(x)
        assert (deployed(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    check_same(ours, plain, x)


def check_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """In float64, where weights in a wrong place could not be taken for roundings of a deep network."""
    with torch.inference_mode():
        expected, got = theirs.double()(x.double()), ours.double().eval()(x.double())
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def small(timm, **options) -> nn.Module:
    torch.manual_seed(0)
    settings = dict(num_classes=5) | SMALL | options
    model = timm.models.iformer.IFormer(**settings)
    return with_statistics(model, settings.get("in_chans", 3)).eval()


def classes_removed(timm) -> nn.Module:
    model = small(timm)
    model.reset_classifier(0)
    return model


VARIANTS = {
    "no classes": lambda timm: small(timm, num_classes=0),
    "no classes, distilled": lambda timm: small(timm, num_classes=0, distillation=True),
    "classes removed": classes_removed,
    "five channels": lambda timm: small(timm, in_chans=5),
    "layer scale": lambda timm: small(timm, layer_scale_init_value=0.3, drop_path_rate=0.2, drop_rate=0.1),
    "fused": lambda timm: small(timm, distillation=True).fuse().eval(),
    "fused, no classes": lambda timm: small(timm, num_classes=0, layer_scale_init_value=0.3).fuse().eval(),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_timm(timm, variant):
    plain = VARIANTS[variant](timm)
    x = torch.randn(2, 5 if "five" in variant else 3, 50, 34)
    fast = copy.deepcopy(plain)
    report = mfkernels.accelerate(fast)
    assert not [left for left in report.left if left.kind != "SHMA" or "fused" not in variant]
    with torch.inference_mode():
        expected = plain(x)
        scale = expected.abs().max()
        assert (fast(x) - expected).abs().max() < 1e-5 * scale
        for model in (plain, fast):
            assert (mfkernels.deploy(model)(x) - expected).abs().max() < 1e-4 * scale


def test_what_is_not_known_of_timm_is_named(timm):
    for change, message in (
        (dict(num_classes=0, global_pool=""), "it has global_pool ''"),
        (dict(act_layer=nn.SiLU), "it computes something else"),
        (dict(dims=(12, 12, 16, 16)), "its structure is not that"),
    ):
        model = timm.models.iformer.IFormer(**(SMALL | change)).eval()
        with pytest.raises(TypeError, match=f"deploy: model is a IFormer, but {message}"):
            mfkernels.deploy(model)
    model = small(timm)
    model.prune_intermediate_layers([0, 1])
    model.eval()
    with pytest.raises(TypeError, match="it has 2 stages; only four are known"):
        mfkernels.deploy(model)


def test_names_of_timm_are_told_from_ours(timm):
    """A state that fits neither lists what is missing by our names."""
    state = timm.create_model("iformer_t", num_classes=5).state_dict()
    del state["stem.conv1.c.weight"]
    state["more"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"missing \(1\):\n  downsample_layers\.0\.0\.c\.weight\nunknown \(1\)"
    ):
        load_released(create_model("iformer_t", num_classes=5), state)


def test_checkpoint_of_timm(timm, tmp_path):
    plain = make(timm, "iformer_t")
    torch.save(plain.state_dict(), tmp_path / "timm.pth")
    ours = create_model("iformer_t", num_classes=5, checkpoint=tmp_path / "timm.pth").eval()
    check_same(ours, plain, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("order", ["timm, mfkernels", "mfkernels, timm"])
def test_both_registries(timm, order):
    """Each network of timm stays timm's, whichever is imported first; ours get another name."""
    script = f"""
import {order}, mfkernels, torch
theirs = "timm.models.iformer"
mfkernels.models.register_with_timm()
names = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__ == theirs]
assert len(names) == 9 and timm.list_models(module="iformer") == sorted(names, key=timm.list_models().index)
assert type(timm.create_model("iformer_t", num_classes=3)).__module__ == theirs
ours = timm.create_model("mfkernels_iformer_t", num_classes=3)
assert type(ours) is mfkernels.models.IFormer
assert "iformer_t.in1k" in timm.list_models(pretrained=True)
assert not [n for n in timm.list_models(pretrained=True) if "mfkernels" in n or "mobile_former" in n]
for name in mfkernels.models.list_models():
    key = "mfkernels_" + name if name in names else name
    entry = timm.models.model_entrypoint(key)
    assert entry.__module__ == "mfkernels.models.timm_registry" and entry.__name__ == key
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- pyramids -----------------------------------------------------------------------------------------------

PYRAMIDS = ("mobile_former_26m", "dmf_96", "iformer_t")


@pytest.mark.parametrize("name", PYRAMIDS)
def test_feature_info_answers_as_that_of_timm(timm, name):
    ours = create_model(name, features_only=True, out_indices=(1, -1)).feature_info
    theirs = timm.models.FeatureInfo(copy.deepcopy(ours.info), ours.out_indices)
    assert len(ours) == len(theirs) == 4 and ours.out_indices == (1, 3)
    for method in ("channels", "reduction", "module_name"):
        for idx in (None, 2, -1, [0, 3], (1,)):
            assert getattr(ours, method)(idx) == getattr(theirs, method)(idx)
    for keys in (None, ["num_chs", "index"]):
        for idx in (None, 2, [0, 3]):
            assert ours.get_dicts(keys, idx) == theirs.get_dicts(keys, idx)
    assert ours[2] == theirs[2] and ours.get("index") == theirs.get("index")


@pytest.mark.parametrize("name", PYRAMIDS)
def test_backbone_of_transformers(timm, name):
    transformers = pytest.importorskip("transformers")
    mfkernels.models.register_with_timm()
    name = name if "iformer" not in name else f"mfkernels_{name}"
    x = torch.randn(1, 3, 64, 64)
    for settings in (dict(out_indices=[1, 3]), dict(out_indices=[0, 2], freeze_batch_norm_2d=True), {}):
        torch.manual_seed(0)
        config = transformers.TimmBackboneConfig(backbone=name, **settings)
        backbone = transformers.TimmBackbone(config).eval()
        indices = settings.get("out_indices", [3])
        assert backbone.config.out_indices == indices
        with torch.inference_mode():
            every = backbone(x, output_hidden_states=True)
            maps = backbone(x).feature_maps
            plain = [backbone._backbone.network.feature_maps(x)[i] for i in indices]
        assert [m.shape[1] for m in maps] == backbone.channels
        assert len(every.hidden_states) == 4
        for seen in (maps, every.feature_maps):
            assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


class Levels(nn.Module):
    """A pyramid under torchvision's FPN."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body, self.out_channels = body, channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels)

    def forward(self, x):
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("kind", ["RetinaNet", "MaskRCNN"])
def test_detectors_of_torchvision(name, kind):
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    levels = Levels(create_model(name, features_only=True), 16)
    sizes = dict(sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4)
    anchors = detection.anchor_utils.AnchorGenerator(**sizes)
    options = dict(num_classes=3, min_size=64, max_size=96)
    if kind == "RetinaNet":
        model = detection.RetinaNet(levels, anchor_generator=anchors, **options)
    else:
        model = detection.MaskRCNN(levels, rpn_anchor_generator=anchors, **options)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    targets = [
        dict(boxes=boxes, labels=torch.tensor([1]), masks=torch.ones(1, *image.shape[1:], dtype=torch.uint8))
        for image in images
    ]
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    gradients = [p.grad for p in levels.body.parameters()]
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in gradients) > len(gradients) // 2
    found = model.eval()(images)
    assert len(found) == 2 and all(d["boxes"].isfinite().all() for d in found)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 2), (1,)])
def test_pyramid_of_timm(timm, out_indices):
    torch.manual_seed(0)
    plain = with_statistics(
        timm.create_model("iformer_t", features_only=True, out_indices=out_indices)
    ).eval()
    x = torch.randn(1, 3, 50, 34)
    fast = copy.deepcopy(plain)
    assert len(mfkernels.accelerate(fast).replaced) > 8
    deployed = mfkernels.deploy(fast)
    assert deployed.feature_info.channels() == plain.feature_info.channels()
    with torch.inference_mode():
        for one, other, expected in zip(fast(x), deployed(x), plain(x), strict=True):
            for maps in (one, other):
                assert maps.shape == expected.shape
                assert (maps - expected).abs().max() < 1e-4 * expected.abs().max()


CHAINS = (
    *(("torchvision", name) for name in ("mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2")),
    *(("timm", name) for name in ("mobilenetv3_large_100", "mobilenetv3_small_050", "mobilenetv2_100")),
    *(("timm", name) for name in ("mnasnet_100", "lcnet_050")),
    ("torchvision", "efficientnet_b0"),
    *(("timm", name) for name in ("efficientnet_b0", "efficientnet_lite0")),
    *(("timm", name) for name in ("tf_efficientnet_b0", "tf_mobilenetv3_small_100", "tf_efficientnetv2_b0")),
    *(
        ("timm", name)
        for name in ("mobilenetv4_conv_small", "mobilenet_edgetpu_100", "repvgg_a0", "mobileone_s0")
    ),
    *(("timm", name) for name in ("resnet18", "seresnet18", "regnety_002", "gernet_s")),
    *(("torchvision", name) for name in ("resnet18", "resnet50")),
)


@pytest.mark.parametrize(("library", "name"), CHAINS)
def test_deployed_chains(library, name):
    if library == "timm":
        make = pytest.importorskip("timm").create_model
    else:
        make = pytest.importorskip("torchvision").models.get_model
    torch.manual_seed(0)
    model = make(name, num_classes=5)
    # Of two images of 64x64 alone, signals of other sizes would grow a thousandfold, and errors with them.
    randomise(model)
    if name in ("repvgg_a0", "mobileone_s0"):
        model = pytest.importorskip("timm.utils").reparameterize_model(model)
    model.eval()
    check_numbers(model, [(2, 64, 64), (1, 97, 70)] * 3, name)


NETWORKS = ("mobilenetv3_large_100", "mobilenetv2_100", "efficientnet_b0", "tf_efficientnet_b0", "resnet18")


@pytest.mark.parametrize("name", NETWORKS)
def test_deployed_pyramids_of_chains(name):
    torch.manual_seed(0)
    make = pytest.importorskip("timm").create_model
    model = make(name, features_only=True)
    randomise(model)
    model.eval()
    deployed = mfkernels.deploy(model)
    assert deployed.feature_info.channels() == model.feature_info.channels()
    assert deployed.feature_info.reduction() == model.feature_info.reduction()
    for size in ((2, 64, 64), (1, 97, 70)):
        x = torch.randn(size[0], 3, *size[1:])
        for one, other in zip(deployed(x), truth(model, x), strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() < 1e-4 * other.abs().max()

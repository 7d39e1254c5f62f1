"""Detectors and Semantic FPN over the pyramids: parameters as the papers count, training, results, errors.

It needs an environment with torchvision: `make vision`.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mfkernels
from mfkernels.models import create_model

pytest.importorskip("torchvision")
detection = pytest.importorskip("mfkernels.detection")
segmentation = pytest.importorskip("mfkernels.segmentation")
pytestmark = pytest.mark.vision
DETECTORS = {"retinanet": (detection.retinanet, 3), "mask_rcnn": (detection.mask_rcnn, 4)}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "name", "backbone", "total"),
    [
        ("retinanet", "mobile_former_151m", 4_907_788, 14_385_664),
        ("retinanet", "mobile_former_214m", 5_728_344, 15_222_604),
        ("retinanet", "mobile_former_294m", 6_580_368, 16_088_964),
        ("retinanet", "mobile_former_508m", 8_429_000, 17_968_316),
        ("retinanet", "dmf_xxs", None, 19_350_036),
        ("retinanet", "dmf_xs", None, 22_327_832),
        ("retinanet", "dmf_s", None, 26_004_784),
        ("mask_rcnn", "dmf_s", None, 36_542_764),
    ],
)
def test_parameters(kind, name, backbone, total):
    model = DETECTORS[kind][0](name)
    assert count(model) == total
    assert backbone is None or count(model.backbone.body) == backbone


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("mobile_former_151m", 2.56),
        ("mobile_former_214m", 3.78),
        ("mobile_former_294m", 5.33),
        ("mobile_former_508m", 9.66),
        ("dmf_xxs", 3.17),
        ("dmf_xs", 4.71),
        ("dmf_s", 8.92),
    ],
)
def test_multiply_adds_of_the_backbones(name, backbone):
    """In 10^9, at 800x1333."""
    with torch.device("meta"):
        model, image = detection.retinanet(name).backbone.body.eval(), torch.empty(1, 3, 800, 1333)
    with mfkernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(image)
    assert abs(counter.get_total_flops() / 2e9 - backbone) < 0.01


@pytest.mark.parametrize(
    ("name", "on_output"), [("mobile_former_26m", True), ("dmf_xxs", False), ("iformer_t", False)]
)
def test_coarse_levels(name, on_output):
    """iformer_t's last map has as many channels as the levels: torchvision alone would take the wrong one."""
    torch.manual_seed(0)
    backbone = detection.retinanet(name).eval().backbone
    x = torch.randn(1, 3, 128, 96)
    with torch.inference_mode():
        levels, last = backbone(x), backbone.body(x)[-1]
        source = levels["2"] if on_output else last
        sixth = backbone.fpn.extra_blocks.p6(source)
        seventh = backbone.fpn.extra_blocks.p7(sixth.relu())
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]
    assert torch.equal(levels["p6"], sixth) and torch.equal(levels["p7"], seventh)


def targets(kind: str, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The same box in every image, of the last class."""
    label = 4 if kind == "mask_rcnn" else 3
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    labels = torch.tensor([label])
    return [
        dict(boxes=boxes, labels=labels, masks=torch.ones(1, *image.shape[1:], dtype=torch.uint8))
        for image in images
    ]


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_xxs", "iformer_t", "iformer_m"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_training_step_and_detections(kind, name):
    torch.manual_seed(0)
    create, _ = DETECTORS[kind]
    model = create(name, num_classes=4, min_size=64, max_size=96)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    losses = model(images, targets(kind, images))
    sum(losses.values()).backward()
    for part in (model.backbone.body, model.backbone.fpn):
        gradients = [p.grad for p in part.parameters()]
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert sum(g is not None and bool(g.abs().max() > 0) for g in gradients) > len(gradients) // 2
    found = model.eval()(images)
    assert len(found) == 2
    for image, result in zip(images, found, strict=True):
        assert result["boxes"].isfinite().all()
        assert set(result["labels"].tolist()) <= set(range(5))
        if kind == "mask_rcnn":
            assert result["masks"].shape[-2:] == image.shape[-2:]


@pytest.mark.parametrize("kind", DETECTORS)
def test_deployed_backbone(kind):
    torch.manual_seed(0)
    create, maps = DETECTORS[kind]
    pyramid = create_model("mobile_former_26m", features_only=True, out_indices=maps)
    model = create(pyramid, num_classes=4, min_size=64, max_size=96).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        plain = model.backbone(x)
        model.backbone.body = mfkernels.deploy(model.backbone.body)
        fast = model.backbone(x)
        assert len(model([torch.rand(3, 64, 64)])) == 1
    assert list(plain) == list(fast)
    for level in plain:
        assert (plain[level] - fast[level]).abs().max() < 1e-4 * plain[level].abs().max()


@pytest.mark.parametrize("kind", DETECTORS)
def test_bad_arguments(kind):
    create, maps = DETECTORS[kind]
    with pytest.raises(ValueError, match="did you mean dmf_s"):
        create("dmf_ss")
    with pytest.raises(TypeError, match="backbone must be a name or a FeaturePyramid, got MobileFormer"):
        create(create_model("mobile_former_26m"))
    with pytest.raises(ValueError, match=f"backbone must return {maps} maps, got a pyramid of 2"):
        create(create_model("mobile_former_26m", features_only=True, out_indices=2))
    for classes in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="num_classes must be a positive integer"):
            create("mobile_former_26m", num_classes=classes)


def test_anchors():
    own, theirs = detection.anchors(), detection.retinanet("mobile_former_26m").anchor_generator
    assert (own.sizes, own.aspect_ratios) == (theirs.sizes, theirs.aspect_ratios)
    assert detection.anchors(16).sizes[:2] == ((16, 20, 25), (32, 40, 50))
    for side in (3, 16.0, True):
        with pytest.raises(ValueError, match=f"anchors: side must be an integer of at least 4, got {side}"):
            detection.anchors(side)


def test_background_has_no_boxes_or_masks():
    model = detection.mask_rcnn("mobile_former_26m", num_classes=4)
    scores, boxes = model.roi_heads.box_predictor(torch.randn(2, 1024))
    masks = model.roi_heads.mask_predictor(torch.randn(2, 256, 3, 3))
    assert (scores.shape, boxes.shape, masks.shape) == ((2, 5), (2, 20), (2, 5, 6, 6))
    assert boxes[:, :4].abs().max() == 0 and masks[:, 0].abs().max() == 0
    assert boxes[:, 4:].abs().min() > 0 and masks[:, 1:].abs().max() > 0


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_xxs", "iformer_t", "iformer_m"])
def test_semantic_fpn(name):
    torch.manual_seed(0)
    model = segmentation.semantic_fpn(name, num_classes=7)
    x = torch.randn(2, 3, 70, 99)  # no level is exactly half of the one before
    labels = torch.randint(7, (2, 70, 99))
    scores = model(x)["out"]
    assert scores.shape == (2, 7, 70, 99)
    F.cross_entropy(scores, labels).backward()
    assert all(p.grad.isfinite().all() for p in model.scale_heads.parameters())
    # In evaluation: level by level as the paper draws it, from the maps of the pyramid.
    model.eval()
    with torch.inference_mode():
        levels = list(model.backbone(x).values())
        total = 0
        for i, level in enumerate(levels):
            for part in model.scale_heads[i]:
                if hasattr(part, "conv"):
                    level = part.bn(F.conv2d(level, part.conv.weight, padding=1)).clamp(min=0)
                    if i:
                        level = F.interpolate(level, scale_factor=2, mode="bilinear")
            total = total + F.interpolate(level, levels[0].shape[2:], mode="bilinear")
        expected = F.interpolate(model.conv_seg(total), (70, 99), mode="bilinear")
        found = model(x)["out"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    convolutions = [sum(hasattr(part, "conv") for part in head) for head in model.scale_heads]
    assert convolutions == [1, 1, 2, 3]
    with pytest.raises(ValueError, match="semantic_fpn: num_classes must be a positive integer, got 0"):
        segmentation.semantic_fpn(name, num_classes=0)


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "detection.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:  # one after the other, as a reader would
        exec(block, names)
    assert names["found"][0]["boxes"].shape == (20, 4)

"""Deployed detectors of torchvision, and Semantic FPN, against the modules that they were made of.

It needs an environment with torchvision: `make vision`.
"""

import copy
import pickle

import pytest
import torch
from test_deploy import BF16, plain, truth
from tolerance import MeanErrors
from torch import nn

import mfkernels
from mfkernels.bench.run import randomise
from mfkernels.models import create_model

pytest.importorskip("torchvision")
detection = pytest.importorskip("mfkernels.detection")
segmentation = pytest.importorskip("mfkernels.segmentation")
pytestmark = pytest.mark.vision
NAMES = ("mobile_former_26m", "dmf_xxs", "iformer_t", "iformer_m")
SIZES = ((2, 97, 131), (1, 64, 64), (1, 200, 50), (1, 1, 1))


def make(create, name: str, **options) -> nn.Module:
    """With layers that are not what they begin as, so that something is found."""
    torch.manual_seed(0)
    model = create(name, **options).eval()
    randomise(model.backbone.body, torch.randn(4, 3, 160, 160))
    for part, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and ".body." not in part:
            module.weight.data.normal_(0, (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1)
        elif isinstance(module, nn.BatchNorm2d) and ".body." not in part:
            module.running_mean.normal_(0, 0.3)
            module.bias.data.normal_(0, 0.3)
    return model.eval()


def retinanet(name: str, **options) -> nn.Module:
    model = make(detection.retinanet, name, num_classes=4, min_size=128, max_size=160, **options)
    # Scores of all sizes, and boxes near their anchors.
    with torch.inference_mode():
        found = head_of(model)(image(0, 1, 96, 128))
    scores, boxes = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    for layer, values, bias in ((scores, found["cls_logits"], -3.0), (boxes, found["bbox_regression"], 0.0)):
        layer.weight.data /= 2 * values.std()
        nn.init.constant_(layer.bias, bias)
    return model


def image(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(seed))


class Errors(MeanErrors):
    """The one tolerance over all images, and within 1e-4 of the largest number, as deploy promises."""

    def add(self, value: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
        assert value.shape == exact.shape
        assert (value - exact).abs().max() < 1e-4 * exact.abs().max()
        self.reference(reference, exact)
        self.kernel(value, exact)


def head_of(model: nn.Module):
    """Scores and boxes of all levels, as torchvision's head returns them."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.head

        def forward(self, x):
            return self.head(list(self.backbone(x).values()))

    return Head()


def by_anchor(maps: list[torch.Tensor], numbers: int) -> torch.Tensor:
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, numbers) for m in maps], 1)


@pytest.mark.parametrize("name", NAMES)
def test_retinanets_head(name):
    model = retinanet(name)
    deployed = mfkernels.deploy(model)
    errors = Errors()
    for seed, size in enumerate(SIZES):
        x = image(seed, *size)
        maps, reference, expected = deployed.network(x), plain(head_of(model), x), truth(head_of(model), x)
        for found, key in ((maps[::2], "cls_logits"), (maps[1::2], "bbox_regression")):
            errors.add(by_anchor(found, 4), reference[key], expected[key])
    errors.check(name)


def same_detections(ours: list, theirs: list) -> None:
    """But for one in fifty, which may be at a threshold."""
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other) and len(other["labels"]) > 20
        near = torch.cdist(one["boxes"], other["boxes"], p=torch.inf) < 0.05  # pixels
        same = near & (one["labels"][:, None] == other["labels"])
        same &= (one["scores"][:, None] - other["scores"]).abs() < 1e-3
        for found in (same.any(0), same.any(1)):
            assert found.float().mean() >= 0.98


@pytest.mark.parametrize("name", NAMES[:3])
def test_retinanets_detections(name):
    model = retinanet(name)
    deployed = mfkernels.deploy(model)
    images = [torch.rand(3, 100, 140), torch.rand(3, 120, 90)]
    before = [one.clone() for one in images]
    with torch.inference_mode():
        same_detections(deployed(images), model(images))
    assert all(torch.equal(a, b) for a, b in zip(images, before, strict=True))
    again = deployed(images)
    for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        for one, expected in zip(other(images), again, strict=True):
            assert all(torch.equal(one[key], expected[key]) for key in expected)
    deployed.detector.score_thresh = 1.0
    assert all(len(found["boxes"]) == 0 for found in deployed(images))
    with pytest.raises(ValueError, match="a deployed RetinaNet has no train mode"):
        deployed.train()(images)


def test_retinanet_as_mmdetection_has_it():
    model = retinanet("mobile_former_26m")
    model.backbone.fpn.extra_blocks.relu_before_p7 = False
    x = image(0, 1, 97, 131)
    maps, expected = mfkernels.deploy(model).network(x), truth(head_of(model), x)["cls_logits"]
    assert (by_anchor(maps[::2], 4) - expected).abs().max() < 2e-5 * expected.abs().max()


@BF16
def test_bfloat16():
    """At most twice the error of the plain head in bfloat16, over all images."""
    model = retinanet("mobile_former_26m")
    deployed, rounded = (
        mfkernels.deploy(model, dtype=torch.bfloat16),
        head_of(copy.deepcopy(model)).bfloat16(),
    )
    ours, reference = [], []
    for seed in range(3):
        x = image(seed, 1, 97, 131)
        maps, exact = deployed.network(x), truth(head_of(model), x)
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
            of_plain = rounded(x.bfloat16())
        ours.append((by_anchor(maps[::2], 4) - exact["cls_logits"]).abs().max())
        reference.append((of_plain["cls_logits"] - exact["cls_logits"]).abs().max())
        assert maps[0].dtype == torch.float32
    assert sum(ours) <= 2 * sum(reference)
    assert len(deployed([torch.rand(3, 100, 140)])[0]["boxes"]) > 0


class LevelsAndProposals(nn.Module):
    """Hands out the levels of a Mask R-CNN, their scores and their boxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.rpn.head

    def forward(self, x):
        levels = list(self.backbone(x).values())
        return levels, *self.head(levels)


@pytest.mark.parametrize("name", NAMES)
def test_mask_rcnn(name):
    model = make(detection.mask_rcnn, name, num_classes=4, min_size=128, max_size=160)
    deployed, definition = mfkernels.deploy(model), LevelsAndProposals(model)
    errors = Errors()
    for seed, size in enumerate(SIZES):
        x = image(seed, *size)
        found, reference, expected = deployed.backbone(x), plain(definition, x), truth(definition, x)
        assert list(found) == ["0", "1", "2", "3", "pool"]
        ours = (list(found.values()), found.scores, found.boxes)
        for maps in zip(ours, reference, expected, strict=True):
            for values in zip(*maps, strict=True):
                errors.add(*values)
    errors.check(name)
    assert deployed.roi_heads is not model.roi_heads
    images = [torch.rand(3, 100, 140), torch.rand(3, 120, 90)]
    found = deployed(images)
    assert len(found) == 2 and found[0]["masks"].shape[-2:] == (100, 140)
    assert set(found[0]) == {"boxes", "labels", "scores", "masks"}


def test_proposals():
    """Of the same scores and boxes, the very regions that torchvision proposes."""
    from torchvision.models.detection.image_list import ImageList

    from mfkernels.deploy.cpu.detectors import LevelsAndProposals as Levels

    model = make(detection.mask_rcnn, "mobile_former_26m", num_classes=4)
    deployed, x = mfkernels.deploy(model), image(0, 2, 97, 131)
    images = ImageList(x, [(97, 131), (80, 100)])
    with torch.inference_mode():
        levels = model.backbone(x)
        features = Levels(levels)
        features.scores, features.boxes = model.rpn.head(list(levels.values()))
        for ours, theirs in zip(deployed.rpn(images, features)[0], model.rpn(images, levels)[0], strict=True):
            assert len(ours) > 100 and torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="a deployed Mask R-CNN has no train mode"):
        deployed.rpn.train()(images, features)


def test_other_proposals_remain():
    """Those of a head or a network that is not torchvision's own."""
    model = make(detection.mask_rcnn, "mobile_former_26m", num_classes=4, min_size=128, max_size=160)

    class Head(type(model.rpn.head)):
        pass

    model.rpn.head.__class__ = Head
    deployed = mfkernels.deploy(model)
    assert type(deployed.rpn) is type(model.rpn) and type(deployed.backbone(image(0, 1, 64, 64))) is dict
    assert set(deployed([torch.rand(3, 100, 140)])[0]) == {"boxes", "labels", "scores", "masks"}


@pytest.mark.parametrize("extra", [True, False])
def test_levels_alone(extra):
    model = make(detection.mask_rcnn, "mobile_former_26m", num_classes=4)
    if not extra:
        model.backbone.fpn.extra_blocks = None
    deployed, x = mfkernels.deploy(model.backbone), image(0, 2, 64, 96)
    found, expected = deployed(x), truth(model.backbone, x)
    assert list(found) == list(expected) and deployed.out_channels == 256
    for level in found:
        assert (found[level] - expected[level]).abs().max() < 2e-5 * expected[level].abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_semantic_fpn(name):
    model = make(segmentation.semantic_fpn, name, num_classes=7)
    deployed = mfkernels.deploy(model)
    errors = Errors()
    for seed, size in enumerate(SIZES):
        x = image(seed, *size)
        errors.add(deployed(x)["out"], plain(model, x)["out"], truth(model, x)["out"])
    errors.check(name)


def test_what_cannot_be_deployed_is_named():
    model = retinanet("mobile_former_26m")
    layers = model.head.regression_head.conv[1]
    model.head.regression_head.conv[1] = nn.Sequential(layers[0], nn.GroupNorm(32, 256), layers[1]).eval()
    with pytest.raises(
        ValueError, match=r"head\.regression_head\.conv\.1\.1 \(GroupNorm\): unknown to deploy"
    ):
        mfkernels.deploy(model)
    model = retinanet("mobile_former_26m")
    model.backbone.body = mfkernels.deploy(model.backbone.body)
    with pytest.raises(ValueError, match="backbone of a RetinaNet must be a feature pyramid network over a"):
        mfkernels.deploy(model)
    model = retinanet("mobile_former_26m")
    model.backbone.fpn.layer_blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"backbone\.fpn\.layer_blocks\.1 .*: has a forward hook"):
        mfkernels.deploy(model)
    model = make(segmentation.semantic_fpn, "mobile_former_26m", num_classes=7)
    model.scale_heads[2][1] = nn.Upsample(scale_factor=2, mode="nearest").eval()
    with pytest.raises(ValueError, match=r"scale_heads\.2\.1 .*: only bilinear up-sampling by two"):
        mfkernels.deploy(model)
    with pytest.raises(ValueError, match="must be in eval mode"):
        mfkernels.deploy(model.train())


def test_a_pyramid_in_another_order():
    pyramid = create_model("mobile_former_26m", features_only=True, out_indices=(1, 2, 3))
    model = retinanet(pyramid)
    times = mfkernels.deploy(model).network.times(image(0, 1, 64, 64))
    assert {"fpn.0", "fpn.p7", "classification_head.4", "regression_head.0"} <= set(times)

"""Checkpoints with the names of mmdetection and mmsegmentation."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchvision")

from mfkernels import detection, openmmlab, segmentation
from mfkernels.models import create_model

pytestmark = pytest.mark.vision


def convolution(
    name: str, outputs: int, inputs: int, size: int, bias: bool = True
) -> dict[str, torch.Tensor]:
    state = {f"{name}.weight": torch.randn(outputs, inputs, size, size) * (inputs * size**2) ** -0.5}
    return state | ({f"{name}.bias": torch.randn(outputs)} if bias else {})


def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    return {f"{name}.weight": weight, f"{name}.bias": torch.randn(outputs)}


def backbone_and_neck(name: str, maps: int, extra: int = 0) -> dict[str, torch.Tensor]:
    """The names of their FPN; a network's names are the released ones."""
    pyramid = create_model(name, features_only=True, out_indices=maps)
    state = {f"backbone.{key}": value for key, value in pyramid.network.state_dict().items()}
    channels = pyramid.feature_info.channels()
    for i, width in enumerate(channels):
        state |= convolution(f"neck.lateral_convs.{i}.conv", 256, width, 1)
    for i in range(maps + extra):
        state |= convolution(f"neck.fpn_convs.{i}.conv", 256, channels[-1] if i == maps else 256, 3)
    return state


def their_retinanet(name: str, classes: int) -> dict[str, torch.Tensor]:
    state = backbone_and_neck(name, 3, extra=2)
    for i in range(4):
        state |= convolution(f"bbox_head.cls_convs.{i}.conv", 256, 256, 3)
        state |= convolution(f"bbox_head.reg_convs.{i}.conv", 256, 256, 3)
    state |= convolution("bbox_head.retina_cls", 9 * classes, 256, 3)
    return state | convolution("bbox_head.retina_reg", 36, 256, 3)


def their_mask_rcnn(name: str, classes: int) -> dict[str, torch.Tensor]:
    state = backbone_and_neck(name, 4)
    state |= convolution("rpn_head.rpn_conv", 256, 256, 3)
    state |= convolution("rpn_head.rpn_cls", 3, 256, 1) | convolution("rpn_head.rpn_reg", 12, 256, 1)
    state |= linear("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 49)
    state |= linear("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
    state |= linear("roi_head.bbox_head.fc_cls", classes + 1, 1024)
    state |= linear("roi_head.bbox_head.fc_reg", 4 * classes, 1024)
    for i in range(4):
        state |= convolution(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3)
    state |= convolution("roi_head.mask_head.upsample", 256, 256, 2)
    return state | convolution("roi_head.mask_head.conv_logits", classes, 256, 1)


def their_semantic_fpn(name: str, classes: int) -> dict[str, torch.Tensor]:
    state = backbone_and_neck(name, 4)
    for i in range(4):
        for k in range(max(1, i)):
            module = f"decode_head.scale_heads.{i}.{2 * k}"
            state |= convolution(f"{module}.conv", 128, 128 if k else 256, 3, bias=False)
            norm = torch.nn.BatchNorm2d(128)
            torch.nn.init.normal_(norm.bias)
            state |= {f"{module}.bn.{key}": value for key, value in norm.state_dict().items()}
    return state | convolution("decode_head.conv_seg", classes, 128, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["dmf_xxs", "iformer_t"])
def test_retinanet(name, tmp_path):
    theirs = their_retinanet(name, 4)
    torch.save({"meta": {"epoch": 12}, "state_dict": theirs}, tmp_path / "theirs.pth")
    model = detection.retinanet(name, num_classes=4).eval()
    openmmlab.load_openmmlab(model, tmp_path / "theirs.pth")
    x = torch.randn(1, 3, 160, 96)
    with torch.inference_mode():
        levels = list(model.backbone(x).values())
        out = model.head(levels)
        last = model.backbone.body(x)[-1]

        def conv(of: torch.Tensor, module: str, **options) -> torch.Tensor:
            return F.conv2d(of, theirs[f"{module}.weight"], theirs[f"{module}.bias"], **options)

        # The coarsest levels by their definition, without a ReLU.
        sixth = conv(last, "neck.fpn_convs.3.conv", stride=2, padding=1)
        torch.testing.assert_close(levels[3], sixth)
        torch.testing.assert_close(levels[4], conv(sixth, "neck.fpn_convs.4.conv", stride=2, padding=1))
        # The last level of the body, and of it the head's scores, anchor by anchor.
        third = conv(conv(last, "neck.lateral_convs.2.conv"), "neck.fpn_convs.2.conv", padding=1)
        torch.testing.assert_close(levels[2], third)
        scores = boxes = levels[4]
        for i in range(4):
            scores = conv(scores, f"bbox_head.cls_convs.{i}.conv", padding=1).relu()
            boxes = conv(boxes, f"bbox_head.reg_convs.{i}.conv", padding=1).relu()
        scores = conv(scores, "bbox_head.retina_cls", padding=1).permute(0, 2, 3, 1).reshape(1, -1, 4)
        boxes = conv(boxes, "bbox_head.retina_reg", padding=1).permute(0, 2, 3, 1).reshape(1, -1, 4)
    torch.testing.assert_close(out["cls_logits"][:, -scores.shape[1] :], scores)
    torch.testing.assert_close(out["bbox_regression"][:, -boxes.shape[1] :], boxes)
    assert len(model([torch.rand(3, 64, 64)])[0]["boxes"]) >= 0


def test_retinanets_anchors():
    model = detection.retinanet("dmf_xxs", num_classes=4)
    openmmlab.load_openmmlab(model, their_retinanet("dmf_xxs", 4))
    from torchvision.models.detection.image_list import ImageList

    sides = [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]  # of 160x224 pixels
    images = ImageList(torch.zeros(1, 3, 160, 224), [(160, 224)])
    (anchors,) = model.anchor_generator(images, [torch.zeros(1, 1, *side) for side in sides])
    assert len(anchors) == 9 * sum(height * width for height, width in sides)
    # The first of the finest level: size 32, twice as wide as high, around the corner.
    half = torch.tensor([2**0.5, 2**-0.5]) * 16
    torch.testing.assert_close(anchors[0], torch.cat([-half, half]))
    # The fifth of the second pixel: a square, the second of three sizes, a stride further.
    half = 32 * 2 ** (1 / 3) / 2
    torch.testing.assert_close(anchors[9 + 4], torch.tensor([8 - half, -half, 8 + half, half]))
    # The last: P7's last pixel is 128 pixels from its first.
    middle = (anchors[-1, :2] + anchors[-1, 2:]) / 2
    torch.testing.assert_close(middle, torch.tensor([128.0, 128.0]))


def test_mask_rcnn():
    theirs = their_mask_rcnn("dmf_xxs", 4)
    model = detection.mask_rcnn("dmf_xxs", num_classes=4, min_size=64, max_size=96).eval()
    openmmlab.load_openmmlab(model, theirs)
    regions = torch.randn(3, 256, 7, 7)
    with torch.inference_mode():
        hidden = model.roi_heads.box_head(regions)
        scores, boxes = model.roi_heads.box_predictor(hidden)
        masks = model.roi_heads.mask_predictor(model.roi_heads.mask_head(regions))

        def dense(x: torch.Tensor, module: str) -> torch.Tensor:
            return F.linear(x, theirs[f"{module}.weight"], theirs[f"{module}.bias"])

        expected = dense(regions.flatten(1), "roi_head.bbox_head.shared_fcs.0").relu()
        expected = dense(expected, "roi_head.bbox_head.shared_fcs.1").relu()
        their_scores = dense(expected, "roi_head.bbox_head.fc_cls")  # the background is the last
        their_boxes = dense(expected, "roi_head.bbox_head.fc_reg")
        torch.testing.assert_close(scores[:, 0], their_scores[:, 4])
        torch.testing.assert_close(scores[:, 1:], their_scores[:, :4])
        torch.testing.assert_close(boxes[:, 4:], their_boxes)
        x = regions
        for i in range(4):
            module = f"roi_head.mask_head.convs.{i}.conv"
            x = F.conv2d(x, theirs[f"{module}.weight"], theirs[f"{module}.bias"], padding=1).relu()
        module = "roi_head.mask_head.upsample"
        x = F.conv_transpose2d(x, theirs[f"{module}.weight"], theirs[f"{module}.bias"], stride=2).relu()
        module = "roi_head.mask_head.conv_logits"
        x = F.conv2d(x, theirs[f"{module}.weight"], theirs[f"{module}.bias"])
        torch.testing.assert_close(masks[:, 1:], x)
        assert set(model([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}
    # Regions of a gradient: each bin has the value of its middle, and of the level for the region's size.
    ramp = {str(i): (torch.arange(64.0) + 0.5).expand(1, 256, 64, 64) * 2**i * 4 for i in range(4)}
    boxes = torch.tensor([[10.0, 20, 80, 90], [16, 16, 156, 156]])
    for level in ("0", "2", "3"):
        ramp[level] = ramp[level] + 1000 * int(level)
    read = model.roi_heads.box_roi_pool(ramp, [boxes[:1]], [(256, 256)])
    torch.testing.assert_close(read[0, 0, 3], 10 + (torch.arange(7) + 0.5) * 10)
    read = model.roi_heads.box_roi_pool(ramp, [boxes], [(256, 256)])
    torch.testing.assert_close(read[1, 0, 3], 16 + (torch.arange(7) + 0.5) * 20)
    for level, size in enumerate((32, 64, 128, 256, 512)):
        anchor = model.rpn.anchor_generator.cell_anchors[level][1]
        torch.testing.assert_close(anchor, torch.tensor([-1.0, -1, 1, 1]) * size / 2)


@pytest.mark.parametrize("name", ["iformer_t", "iformer_m"])
def test_semantic_fpn(name):
    theirs = their_semantic_fpn(name, 5)
    model = segmentation.semantic_fpn(name, num_classes=5)
    openmmlab.load_openmmlab(model, {"state_dict": {f"module.{k}": v for k, v in theirs.items()}})
    state = model.state_dict()
    assert len(state) == len(theirs)
    for key in ("scale_heads.3.4.bn.bias", "conv_seg.weight"):
        assert torch.equal(state[key], theirs[f"decode_head.{key}"])
    assert torch.equal(state["backbone.fpn.layer_blocks.3.0.bias"], theirs["neck.fpn_convs.3.conv.bias"])


def test_what_does_not_fit():
    theirs = their_retinanet("dmf_xxs", 4)
    model = detection.retinanet("dmf_xxs", num_classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del theirs["neck.fpn_convs.4.conv.bias"]
    theirs["bbox_head.retina_iou.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"(?s)extra_blocks\.p7\.bias.*unknown.*bbox_head\.retina_iou\.bias"):
        openmmlab.load_openmmlab(model, theirs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.backbone.fpn.extra_blocks.relu_before_p7
    with pytest.raises(ValueError, match="other shapes"):
        openmmlab.load_openmmlab(detection.retinanet("dmf_xxs", num_classes=5), their_retinanet("dmf_xxs", 4))
    with pytest.raises(TypeError, match="must be a RetinaNet, a MaskRCNN or a SemanticFPN, got Linear"):
        openmmlab.load_openmmlab(torch.nn.Linear(3, 3), theirs)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        openmmlab.load_openmmlab(model, "none.pth")

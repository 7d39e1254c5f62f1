"""torchvision's detectors, and Semantic FPN, over the pyramids; needs torchvision."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops.feature_pyramid_network import (
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from torchvision.ops.misc import Conv2dNormActivation

from ... import _C
from ...detection import CoarseLevels
from ...fpn import PyramidWithFPN
from ...models.features import FeaturePyramid
from ...operators.runner import is_eager
from ...segmentation import SemanticFPN, _ConvBnReLU, _resized
from .convolutions import Convolution
from .packing import padded, padded_slots
from .plan import Map, Plan
from .pyramid import DeployedMaps, Result, Run, Wanted

DETECTORS = (MaskRCNN, PyramidWithFPN, RetinaNet, SemanticFPN)

_KNOWN_OF_FPN = (
    *(PyramidWithFPN, FeaturePyramidNetwork, Conv2dNormActivation, nn.BatchNorm2d, nn.Conv2d, nn.ModuleList),
    *(nn.ReLU, nn.Sequential, CoarseLevels, LastLevelMaxPool, LastLevelP6P7),
)
_KNOWN_OF_RETINANET = (
    *_KNOWN_OF_FPN,
    *(RetinaNetHead, RetinaNetClassificationHead, RetinaNetRegressionHead),
)
_KNOWN_OF_PROPOSALS = (*_KNOWN_OF_FPN, RPNHead)
_KNOWN_OF_SEMANTIC_FPN = (*_KNOWN_OF_FPN, SemanticFPN, _ConvBnReLU, nn.Upsample, nn.Dropout2d)


def deployed_detector(model: Any, run: Run) -> nn.Module:
    """Return what `deploy` makes of one of `DETECTORS`."""
    if isinstance(model, RetinaNet):
        return DeployedRetinaNet(model, _network(model, model.backbone, run, _retinanet))
    if isinstance(model, SemanticFPN):
        return DeployedSemanticFPN(_network(model, model.backbone, run, _semantic_fpn))
    if isinstance(model, PyramidWithFPN):
        return DeployedLevels(model, _network(model, model, run, _levels_alone))
    levels, rpn = model.backbone, model.rpn
    if type(rpn) is not RegionProposalNetwork or type(rpn.head) is not RPNHead:  # of the user's own making
        return copy.deepcopy(
            model, {id(levels): DeployedLevels(levels, _network(model, levels, run, _levels_alone))}
        )
    made = DeployedLevels(levels, _network(model, levels, run, _levels_and_proposals))
    return copy.deepcopy(model, {id(levels): made, id(rpn): DeployedProposals(rpn)})


class DeployedLevels(nn.Module):
    """A backbone and its feature pyramid network, prepared for inference on a CPU.

    Args:
        levels: what it was made of.
        network: hands the levels out, the finest first; or each level, its scores and its boxes.

    Attributes:
        out_channels: of all levels.

    Inputs:
        (B, C, H, W).

    Returns:
        As `PyramidWithFPN`; beside scores and boxes `LevelsAndProposals`.
    """

    def __init__(self, levels: PyramidWithFPN, network: DeployedMaps) -> None:
        super().__init__()
        self.network, self.out_channels = network, levels.out_channels
        self.names = [str(i) for i in range(len(levels.body.return_layers))]
        self.names += {LastLevelMaxPool: ["pool"], type(None): []}.get(
            type(levels.fpn.extra_blocks), ["p6", "p7"]
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.network(x)
        if len(maps) == len(self.names):
            return dict(zip(self.names, maps, strict=True))
        found = LevelsAndProposals(zip(self.names, maps[::3], strict=True))
        found.scores, found.boxes = list(maps[1::3]), list(maps[2::3])
        return found


class LevelsAndProposals(dict[str, Tensor]):
    """Hold the levels by name, and what the head of a region proposal network makes of them.

    `scores`: (B, A, H, W) for each level, and `boxes`: (B, 4 A, H, W), where A is the number of anchors.
    """

    scores: list[Tensor]
    boxes: list[Tensor]


class DeployedProposals(nn.Module):
    """Propose regions as torchvision's `RegionProposalNetwork` does, after its head.

    Args:
        rpn: what it was made of.

    Attributes:
        rpn: torchvision's, without its head; the settings are its.

    Inputs:
        images and features, as of torchvision's; the features are `LevelsAndProposals`. `targets` are not
        used.

    Returns:
        As torchvision's in eval mode.

    Raises:
        ValueError: in train mode.
    """

    def __init__(self, rpn: RegionProposalNetwork) -> None:
        super().__init__()
        self.rpn = copy.deepcopy(rpn, {id(rpn.head): None})
        self.eval()

    def forward(
        self, images: ImageList, features: LevelsAndProposals, targets: Any = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        if self.training:
            raise ValueError("deploy: a deployed Mask R-CNN has no train mode; train the one it was made of")
        rpn: Any = self.rpn
        counts = [one[0].numel() for one in features.scores]
        scores, offsets = concat_box_prediction_layers(features.scores, features.boxes)
        anchors = rpn.anchor_generator(images, list(features.values()))
        boxes = rpn.box_coder.decode(offsets, anchors).view(len(anchors), -1, 4)
        return rpn.filter_proposals(boxes, scores, images.image_sizes, counts)[0], {}


class DeployedRetinaNet(nn.Module):
    """A RetinaNet prepared for inference on a CPU.

    torchvision's own transform, anchors and suppression of boxes are before and after it; their settings are
    those of `detector`.

    Args:
        model: what it was made of.
        network: hands out the scores and then the boxes of each level.

    Attributes:
        detector: torchvision's, without backbone and head.

    Inputs:
        images, a list of (C, H, W). `targets` are not used.

    Returns:
        As torchvision's in eval mode: a dictionary for each image, of `boxes`, `scores` and `labels`.

    Raises:
        ValueError: in train mode.
    """

    def __init__(self, model: RetinaNet, network: DeployedMaps) -> None:
        super().__init__()
        self.detector = copy.deepcopy(model, {id(model.backbone): None, id(model.head): None})
        self.network = network
        self.num_classes = model.head.classification_head.num_classes
        self.eval()

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        if self.training:
            raise ValueError("deploy: a deployed RetinaNet has no train mode; train the one it was made of")
        detector: Any = self.detector
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = detector.transform(images)
        maps = self.network(batch.tensors.contiguous(memory_format=torch.channels_last))
        scores, boxes = maps[::2], maps[1::2]
        made = dict(
            cls_logits=[_by_anchor(one, self.num_classes) for one in scores],
            bbox_regression=[_by_anchor(one, 4) for one in boxes],
        )
        counts = [one.shape[1] for one in made["bbox_regression"]]
        anchors = [list(one.split(counts)) for one in detector.anchor_generator(batch, scores)]
        found = detector.postprocess_detections(made, anchors, batch.image_sizes)
        return detector.transform.postprocess(found, batch.image_sizes, sizes)


def _by_anchor(x: Tensor, numbers: int) -> Tensor:
    """(B, A * numbers, H, W) as (B, H * W * A, numbers), which is no copy where it is channels last."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, numbers)


class DeployedSemanticFPN(nn.Module):
    """Semantic FPN prepared for inference on a CPU, but for the last up-sampling, which is PyTorch's.

    Args:
        network: hands out the scores in the finest level's size.

    Inputs:
        (B, C, H, W).

    Returns:
        As `SemanticFPN`.
    """

    def __init__(self, network: DeployedMaps) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        (scores,) = self.network(x)
        if scores.shape[2:] == x.shape[2:] or not is_eager():
            return {"out": _resized(scores, x.shape[2:])}
        # New memory, of hundreds of megabytes: its pages would cost half of the time.
        out = scores.new_empty((*scores.shape[:2], *x.shape[2:]))
        _C.advise_huge_pages(out.data_ptr(), out.numel() * out.element_size())
        resize = torch.ops.aten.upsample_bilinear2d.out
        return {"out": resize(scores, x.shape[2:], False, None, None, out=out)}


# --- plans -------------------------------------------------------------------------------------------------


def _network(model: Any, levels: Any, run: Run, following: Callable[..., list[Result]]) -> DeployedMaps:
    """Return the network whose results `following` adds and names."""
    if type(levels) is not PyramidWithFPN or not isinstance(levels.body, FeaturePyramid):
        found = type(getattr(levels, "body", levels)).__name__
        raise ValueError(
            f"deploy: backbone of a {type(model).__name__} must be a feature pyramid network over a "
            f"FeaturePyramid, as mfkernels.detection and mfkernels.segmentation make them, got {found}"
        )
    body = levels.body

    def make(plan: Plan, maps: list[Map]) -> DeployedMaps:
        plan.names |= {module: name for name, module in model.named_modules()}
        results = following(plan, model, levels, maps)
        return plan.finished_maps(DeployedMaps, body.in_channels, results)

    return run(body, Wanted(body, following=make))


def _modules_without(model: nn.Module, *left_out: nn.Module) -> Iterable[nn.Module]:
    absent = {module for part in left_out for module in part.modules()}
    return (module for module in model.modules() if module not in absent)


def _levels_alone(plan: Plan, _: Any, levels: Any, maps: list[Map]) -> list[Result]:
    plan.check_parts(_KNOWN_OF_FPN, _modules_without(levels, levels.body))
    made, reductions = _levels(plan, levels, maps)
    for level in made:
        plan.hand_out(level)
    return [Result(level.channels, by) for level, by in zip(made, reductions, strict=True)]


def _levels_and_proposals(plan: Plan, model: Any, levels: Any, maps: list[Map]) -> list[Result]:
    plan.check_parts(_KNOWN_OF_FPN, _modules_without(levels, levels.body))
    head = model.rpn.head
    plan.check_parts(_KNOWN_OF_PROPOSALS, head.modules())
    made, reductions = _levels(plan, levels, maps)
    tower = [Convolution(plan, layers) for layers in head.conv]
    last = [Convolution(plan, [layer]) for layer in (head.cls_logits, head.bbox_pred)]
    results = []
    for i, (level, by) in enumerate(zip(made, reductions, strict=True)):
        plan.hand_out(level)
        results.append(Result(level.channels, by))
        with plan.named(f"rpn.{i}"):
            x = level
            for layer in tower:
                x = plan.replaced(x, layer(x))
            for layer in last:
                out = layer(x)
                plan.hand_out(out)
                plan.free(out)
                results.append(Result(out.channels, by))
            plan.free(x)
    return results


def _levels(plan: Plan, levels: Any, maps: list[Map]) -> tuple[list[Map], list[int]]:
    """Add a feature pyramid network over kept maps; return its levels, and image pixels for one of theirs."""
    fpn, reductions = levels.fpn, list(levels.body.feature_info.reduction())
    made: list[Map] = []
    coarser: Map | None = None
    for i in reversed(range(len(maps))):
        with plan.named(f"fpn.{i}"):
            lateral = Convolution(plan, fpn.inner_blocks[i])(maps[i])
            if i < len(maps) - 1:
                plan.release(maps[i])
            if coarser is not None:
                lateral = plan.replaced(lateral, plan.resize(coarser, lateral, added=lateral))
                plan.free(coarser)
            coarser = lateral
            made.insert(0, Convolution(plan, fpn.layer_blocks[i])(lateral))
    assert coarser is not None
    plan.free(coarser)
    extra = fpn.extra_blocks
    if isinstance(extra, LastLevelMaxPool):
        with plan.named("fpn.pool"):
            made.append(plan.resize(made[-1], "half"))
    elif extra is not None:
        with plan.named("fpn.p6"):
            made.append(Convolution(plan, [extra.p6])(made[-1] if extra.use_P5 else maps[-1]))
        with plan.named("fpn.p7"):
            sixth = made[-1]
            positive = _positive(plan, sixth) if getattr(extra, "relu_before_p7", True) else sixth
            made.append(Convolution(plan, [extra.p7])(positive))
            if positive is not sixth:
                plan.free(positive)
    plan.release(maps[-1])
    reductions += [reductions[-1] * 2**i for i in range(1, len(made) - len(maps) + 1)]
    return made, reductions


def _positive(plan: Plan, x: Map) -> Map:
    """Add a ReLU alone: that of a convolution which changes nothing."""
    weight = torch.zeros(x.channels, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    taps = plan.pack.depthwise(weight, torch.zeros(x.channels), padded_slots(x.channels))
    return plan.depthwise(x, 3, taps, taps + 9 * padded(x.channels), activation="relu")


def _retinanet(plan: Plan, model: Any, levels: Any, maps: list[Map]) -> list[Result]:
    plan.check_parts(_KNOWN_OF_FPN, _modules_without(levels, levels.body))
    head = model.head
    plan.check_parts(_KNOWN_OF_RETINANET, head.modules())
    made, reductions = _levels(plan, levels, maps)
    towers = [
        [*(Convolution(plan, layers) for layers in part.conv), Convolution(plan, [last])]
        for part, last in (
            (head.classification_head, head.classification_head.cls_logits),
            (head.regression_head, head.regression_head.bbox_reg),
        )
    ]
    results = []
    for i, (level, by) in enumerate(zip(made, reductions, strict=True)):
        for name, tower in zip(("classification_head", "regression_head"), towers, strict=True):
            with plan.named(f"{name}.{i}"):
                x = level
                for layer in tower:
                    out = layer(x)
                    x = out if x is level else plan.replaced(x, out)
                plan.hand_out(x)
                plan.free(x)
            results.append(Result(x.channels, by))
        plan.free(level)
    return results


def _semantic_fpn(plan: Plan, model: Any, levels: Any, maps: list[Map]) -> list[Result]:
    plan.check_parts(_KNOWN_OF_SEMANTIC_FPN, _modules_without(model, levels.body))
    made, reductions = _levels(plan, levels, maps)
    total: Map | None = None
    for i, (level, head) in enumerate(zip(made, model.scale_heads, strict=True)):
        with plan.named(f"scale_heads.{i}"):
            x = level
            for part in head:
                if isinstance(part, nn.Upsample):
                    fits = part.mode == "bilinear" and part.scale_factor == 2 and not part.align_corners
                    plan.need(fits, part, "bilinear up-sampling by two, corners not aligned,")
                    x = plan.replaced(x, plan.resize(x, "twice", "bilinear"))
                else:
                    x = plan.replaced(x, Convolution(plan, [part.conv, part.bn], relu=True)(x))
            if total is not None:
                x = plan.replaced(x, plan.resize(x, total, "bilinear", added=total))
                plan.free(total)
            total = x
    assert total is not None
    with plan.named("conv_seg"):
        scores = plan.replaced(total, Convolution(plan, [model.conv_seg])(total))
        plan.hand_out(scores)
    return [Result(scores.channels, reductions[0])]

"""The end-to-end Mobile-Former detector: the network and its four variants."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_shape, check_tensor
from ..nn.detection_block import DetectionBlock
from ..nn.inputs import check_channels
from ..nn.padding import Padding, hide
from ..nn.up_conv import UpConv
from .features import FeaturePyramid
from .mobile_former import MobileFormer, create_mobile_former


class Detections(NamedTuple):
    """Hold what the queries of a detector found.

    `logits`: (B, Q, num_classes + 1), the last that there is no object. `boxes`: (B, Q, 4), of the image
    without its padding, in 0..1: x and y of the centre, width and height. `auxiliary`: the same of the blocks
    before the last, in order.
    """

    logits: Tensor
    boxes: Tensor
    auxiliary: tuple["Detections", ...] = ()


class EndToEndMobileFormer(nn.Module):
    """Detect objects end to end, with object queries beside Mobile-Former blocks.

    The head's blocks work at several scales, from the coarsest map of a backbone on.

    `create_model` makes the paper's variants. Each block's queries are predicted from by the same layers: a
    linear one for classes, three for boxes. In training the backbone's batch norms keep their statistics. Its
    weights may be those of a classifier:
    `model.backbone.load_state_dict(create_model(name, checkpoint=path, features_only=True).state_dict())`.

    The first queries are learned, 0 at the start, and so are their first positions; the paper does not say
    the former, its counts do. Another choice where it is silent is an argument of `DetectionBlock` or told
    there and in `UpConv`.

    Args:
        backbone: of a `MobileFormer`. All its maps are there for the head, whatever its `out_indices`.
        blocks: how many at each scale, the coarsest first.
        num_classes: of objects; labels are 0 to num_classes - 1.
        queries: how many objects it can find at most.
        channels: of the head's maps and queries.
        mobile_attention: attention among the pixels of the coarsest scale.
        **block: all other arguments of `DetectionBlock`.

    Inputs:
        images (B, 3, H, W), normalised; H and W at least 1. `mask`: None, or (B, H, W), bool, True where
        there is no image, at the bottom and on the right: detections of an image are then the same in every
        batch. Any sizes do.

    Returns:
        `Detections`.

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 4; no released code.
    """

    def __init__(
        self,
        backbone: FeaturePyramid,
        blocks: Sequence[int],
        *,
        num_classes: int = 91,
        queries: int = 100,
        channels: int = 256,
        mobile_attention: bool = True,
        **block: Any,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, FeaturePyramid) or not isinstance(backbone.network, MobileFormer):
            raise TypeError(
                "EndToEndMobileFormer: backbone must be a FeaturePyramid of a MobileFormer, "
                f"got {type(backbone).__name__}"
            )
        for name, value in (("num_classes", num_classes), ("queries", queries)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"EndToEndMobileFormer: {name} must be a positive integer, got {value!r}")
        widths = [facts["num_chs"] for facts in backbone.feature_info.info][::-1]
        if not 1 <= len(blocks) <= len(widths) or min(blocks) < 1:
            raise ValueError(
                f"EndToEndMobileFormer: blocks must be positive numbers, from 1 to {len(widths)} of them, "
                f"got {tuple(blocks)}"
            )
        self.backbone = backbone
        self.content = nn.Parameter(torch.zeros(queries, channels))
        self.position = nn.Parameter(torch.randn(queries, channels))
        self.projection = nn.Conv2d(widths[0], channels, 1)
        self.up_convs = nn.ModuleList(UpConv(width, channels) for width in widths[1 : len(blocks)])
        self.scales = nn.ModuleList(
            nn.ModuleList(
                DetectionBlock(
                    channels, queries=queries, mobile_attention=mobile_attention and scale == 0, **block
                )
                for _ in range(count)
            )
            for scale, count in enumerate(blocks)
        )
        self.classify = nn.Linear(channels, num_classes + 1)
        self.locate = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, 4),
            nn.Sigmoid(),
        )

    def train(self, mode: bool = True) -> "EndToEndMobileFormer":
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Detections:
        padding = self._checked(images, mask)
        network = cast(MobileFormer, self.backbone.network)
        coarsest_first = network.feature_maps(images, padding)[::-1]
        x = hide(self.projection(coarsest_first[0]), padding)
        queries, position = (
            p[:, None].expand(-1, images.shape[0], -1).contiguous() for p in (self.content, self.position)
        )
        found = []
        for scale, blocks in enumerate(self.scales):
            if scale > 0:
                x = self.up_convs[scale - 1](x, coarsest_first[scale], padding)
            for block in cast(nn.ModuleList, blocks):
                x, queries, position = block(x, queries, position, padding)
                found.append(queries)
        of_blocks = torch.stack(found).transpose(1, 2)  # (blocks, B, Q, C)
        logits, boxes = self.classify(of_blocks), self.locate(of_blocks)
        *earlier, last = map(Detections, logits.unbind(), boxes.unbind())
        return last._replace(auxiliary=tuple(earlier))

    def _checked(self, images: Tensor, mask: Tensor | None) -> Padding | None:
        name = type(self).__name__
        check_tensor(name, "images", images, "B C H W")
        check_channels(name, images, self.backbone.in_channels)
        if 0 in images.shape[2:]:
            raise ValueError(f"{name}: images must have a pixel at least, got shape {tuple(images.shape)}")
        if mask is None:
            return None
        padding = Padding(mask)
        check_shape(name, "mask", mask, "B H W", (images.shape[0], *images.shape[2:]))
        return padding


# The backbone, and the blocks at each scale.
_TABLE: dict[str, tuple[str, tuple[int, ...]]] = {
    "e2e_mobile_former_151m": ("mobile_former_151m", (3, 2)),
    "e2e_mobile_former_214m": ("mobile_former_214m", (5, 2)),
    "e2e_mobile_former_294m": ("mobile_former_294m", (6, 3)),
    "e2e_mobile_former_508m": ("mobile_former_508m", (5, 2, 2)),
}

NAMES = tuple(_TABLE)


def create_end_to_end(
    name: str, *, spatial: bool = True, scales: int | None = None, **options: Any
) -> EndToEndMobileFormer:
    """Create a detector of the paper; `options` replace its settings or add to them.

    Args:
        name: one of `NAMES`.
        spatial: spatial-aware dynamic ReLUs in the backbone; ablation: ReLUs of its first token.
        scales: ablation: how many scales have blocks, the coarsest first; None for all.

    Raises:
        ValueError: `scales` is not among those of the network; a setting that does not fit.
    """
    backbone, blocks = _TABLE[name]
    if scales is not None and scales not in range(1, len(blocks) + 1):
        raise ValueError(f"create_model: scales of {name} must be from 1 to {len(blocks)}, got {scales!r}")
    blocks = blocks[:scales]
    network = create_mobile_former(backbone, token_id=-1 if spatial else 0)
    return EndToEndMobileFormer(FeaturePyramid(network), blocks, **options)

"""What `deploy` returns where the results are maps, as those of a `FeaturePyramid`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import register_fake
from ...models.features import FeatureInfo, FeaturePyramid
from ...models.network import Stage
from ...operators.layout import empty_map
from . import steps
from .deployed import Deployed
from .steps import SAME_PADDING


class ChainMaps(NamedTuple):
    """Hold which maps of a network are the results of a plan, as `Wanted` does: `stages` are theirs alone."""

    feature_info: FeatureInfo
    order: list[int]
    stages: list[Stage]


class Wanted:
    """Which maps of a network are the results of a plan, and in which order they are returned.

    Args:
        pyramid: whose results they are.
        order: others than the pyramid returns.
        following: a function that makes the network of the plan and of these maps, in this order, which are
            then no results but kept.
    """

    def __init__(
        self,
        pyramid: FeaturePyramid,
        order: Sequence[int] | None = None,
        following: Callable[[Any, list[Any]], Any] | None = None,
    ) -> None:
        self.feature_info = pyramid.feature_info
        self.order = [int(i) for i in pyramid.return_layers.values()] if order is None else list(order)
        self.following = following
        self._stages = pyramid.network.feature_stages

    @property
    def stages(self) -> list[Stage]:
        """In the order of the network."""
        return [self._stages[i] for i in sorted(self.order)]


# Makes the network of a pyramid's maps, or of what follows them.
Run = Callable[[FeaturePyramid, Wanted], Any]


class Result(NamedTuple):
    """A map that is a result: its channels, and image pixels for one of its own.

    Its size is (side + margin) // reduction of an image's side; without a margin that is rounded up. Where
    the reduction is negative, it has one column of so many rows.
    """

    channels: int
    reduction: int
    margin: int | None = None

    def margin_or_default(self) -> int:
        return max(self.reduction - 1, 0) if self.margin is None else self.margin


class DeployedMaps(Deployed):
    """A network whose results are maps, prepared for inference on a CPU.

    Args:
        results: in the order in which the plan hands them out.
        weights, plan, **options: of `Deployed`, all but the classes.
    """

    def __init__(self, results: Sequence[Result], weights: Tensor, plan: list[int], **options: Any) -> None:
        super().__init__(weights, plan, classes=0, **options)
        self._channels = [result.channels for result in results]
        self._reductions = [result.reduction for result in results]
        self._margins = [result.margin_or_default() for result in results]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Run (B, C, H, W) images on the CPU and return the maps, in the images' dtype and memory format.

        Maps are (B, channels, H / reduction, W / reduction), rounded as the network does it: up, but for an
        iFormer's convolutions of 2x2 and 4x4. The dtype is float32, or that of the network.

        Raises:
            TypeError, ValueError: an input that does not fit, named.
        """
        self.check(x)
        run: Any = torch.ops.mfkernels.deployed_maps
        maps = run(x.float(), self.weights, self.plan, self._channels, self._reductions, self._margins)
        return [one.to(x.dtype) for one in maps]

    def _results(self) -> str:
        return f"channels={self._channels}"


class DeployedPyramid(DeployedMaps):
    """A network without its head, prepared for inference on a CPU.

    Args:
        wanted: its maps.
        results, weights, plan, **options: of `DeployedMaps`.

    Attributes:
        feature_info: that of the network.
    """

    def __init__(
        self,
        wanted: Wanted | ChainMaps,
        results: Sequence[Result],
        weights: Tensor,
        plan: list[int],
        **options: Any,
    ) -> None:
        super().__init__(results, weights, plan, **options)
        self.feature_info = wanted.feature_info
        self._order = [sorted(wanted.order).index(i) for i in wanted.order]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Return the maps as `DeployedMaps` does, in the order of the pyramid."""
        maps = super().forward(x)
        return [maps[i] for i in self._order]

    def _results(self) -> str:
        return f"channels={self.feature_info.channels()}"


class Sizes(NamedTuple):
    """Hold the sides of the square that a convolution or a pooling reads, and its stride and padding.

    None where they are not the same along both axes. The padding may be `SAME_PADDING`, that of TensorFlow.
    """

    kernel: int | None
    stride: int | None
    padding: int | None


def sizes_of(layer: nn.Conv2d | nn.MaxPool2d) -> Sizes:
    padding: Any = layer.padding
    if padding == "same" or type(layer).__name__ == "Conv2dSame":
        padding = SAME_PADDING
    elif padding == "valid":
        padding = 0
    return Sizes(_side(layer.kernel_size), _side(layer.stride), _side(padding))


def _side(value: int | tuple[int, ...]) -> int | None:
    sides = value if isinstance(value, tuple) else (value,)
    return sides[0] if len(set(sides)) == 1 else None


def margin_and_reduction(
    layers: Iterable[nn.Conv2d | nn.MaxPool2d], before: tuple[int, int] = (0, 1)
) -> tuple[int, int]:
    """Return both of the map after these layers, which a plan can say, from those of the map before them."""
    margin, reduction = before
    for layer in layers:
        kernel, stride, padding = sizes_of(layer)
        assert kernel is not None and stride is not None and padding is not None
        margin += reduction * steps.margin(kernel, stride, padding)
        reduction *= stride
    return margin, reduction


def _fake(
    x: Tensor,
    weights: Tensor,
    plan: Tensor,
    channels: Sequence[int],
    reductions: Sequence[int],
    margins: Sequence[int],
) -> list[Tensor]:
    batch, _, height, width = x.shape
    return [
        empty_map(x, (batch, c, -r, 1) if r < 0 else (batch, c, (height + m) // r, (width + m) // r))
        for c, r, m in zip(channels, reductions, margins, strict=True)
    ]


register_fake("deployed_maps")(_fake)

"""What `deploy` returns for a `FeaturePyramid`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import register_fake
from ..models.features import FeaturePyramid
from ..models.network import Stage
from ..operators.layout import empty_map
from .deployed import Deployed


class Wanted:
    """Which maps of a network are the results of a plan, and in which order they are returned.

    Args:
        pyramid: whose results they are.
    """

    def __init__(self, pyramid: FeaturePyramid) -> None:
        self.feature_info = pyramid.feature_info
        self.order = [int(i) for i in pyramid.return_layers.values()]
        self._stages = pyramid.network.feature_stages

    @property
    def stages(self) -> list[Stage]:
        """In the order of the network."""
        return [self._stages[i] for i in sorted(self.order)]


class DeployedPyramid(Deployed):
    """A network without its head, prepared for inference on a CPU.

    Args:
        wanted: its maps.
        operator, weights, plan, **options: of `Deployed`, all but the classes.

    Attributes:
        feature_info: that of the network.
    """

    def __init__(self, wanted: Wanted, weights: Tensor, plan: list[int], **options: Any) -> None:
        super().__init__(weights, plan, classes=0, **options)
        self.feature_info = wanted.feature_info
        self._channels = [stage.channels for stage in wanted.stages]
        self._reductions = [stage.reduction for stage in wanted.stages]
        self._order = [sorted(wanted.order).index(i) for i in wanted.order]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Run (B, C, H, W) images on the CPU and return the maps, in the images' dtype and memory format.

        Maps are (B, channels, H / reduction, W / reduction), rounded up. The dtype is float32, or that of the
        network.

        Raises:
            TypeError, ValueError: an input that does not fit, named.
        """
        self.check(x)
        run: Any = torch.ops.mfkernels.deployed_maps
        maps = run(x.float(), self.weights, self.plan, self._channels, self._reductions)
        return [maps[i].to(x.dtype) for i in self._order]

    def _results(self) -> str:
        return f"channels={self.feature_info.channels()}"


def _fake(
    x: Tensor, weights: Tensor, plan: Tensor, channels: Sequence[int], reductions: Sequence[int]
) -> list[Tensor]:
    batch, _, height, width = x.shape
    return [
        empty_map(x, (batch, c, (height + r - 1) // r, (width + r - 1) // r))
        for c, r in zip(channels, reductions, strict=True)
    ]


register_fake("deployed_maps")(_fake)

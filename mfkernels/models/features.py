"""Networks as backbones: the maps of a pyramid in the place of class scores."""

from collections.abc import Sequence

from torch import Tensor, nn

from .network import Network, Stage


def last_of_each_size(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The last map of each size, from a quarter of the image's on."""
    return tuple({s.reduction: s for s in stages if s.reduction >= 4}.values())


class FeatureInfo:
    """What the maps of a `FeaturePyramid` are, asked as of timm's backbones."""

    def __init__(self, stages: Sequence[Stage], indices: Sequence[int]) -> None:
        self.out_indices = tuple(indices)
        self._stages = [stages[i] for i in indices]

    def channels(self) -> list[int]:
        return [stage.channels for stage in self._stages]

    def reduction(self) -> list[int]:
        return [stage.reduction for stage in self._stages]

    def module_name(self) -> list[str]:
        return [stage.name for stage in self._stages]

    def __len__(self) -> int:
        return len(self._stages)


class FeaturePyramid(nn.Module):
    """A network without its head, which returns the last map of each size: see `create_model`.

    Args:
        network: of `create_model`. Its head is removed.
        out_indices: which of the maps, the finest being 0; negative ones count from the end. None for all.

    Attributes:
        feature_info: `channels()`, `reduction()` and `module_name()` of the maps, a list each.

    Inputs:
        (B, 3, H, W).

    Returns:
        A list of (B, C, H / reduction, W / reduction), rounded up.

    Raises:
        ValueError: `out_indices` names a map that is not there.
    """

    def __init__(self, network: Network, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        stages = network.feature_stages
        indices = range(len(stages)) if out_indices is None else out_indices
        if any(not -len(stages) <= i < len(stages) for i in indices):
            raise ValueError(
                f"FeaturePyramid: out_indices must be of {len(stages)} maps, got {tuple(indices)}"
            )
        self.feature_info = FeatureInfo(stages, [i % len(stages) for i in indices])
        for name in network.head_modules:
            if hasattr(network, name):
                delattr(network, name)
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.feature_maps(x)
        return [maps[i] for i in self.feature_info.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See the network's."""
        self.network.set_grad_checkpointing(enable)

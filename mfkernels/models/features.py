"""Networks as backbones: the maps of a pyramid in the place of class scores."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .network import Network, Stage


def last_of_each_size(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the last map of each size, from a quarter of the image's on."""
    return tuple({s.reduction: s for s in stages if s.reduction >= 4}.values())


class FeatureInfo:
    """Describe the maps of a network, with the methods of timm's backbones.

    All questions but `get_dicts` answer for one map where they are given its index, for several where they
    are given a list, and for those of `out_indices` where they are given nothing; `get_dicts` answers so with
    the keys first.

    Args:
        stages: all maps of the network.
        out_indices: which of them the backbone returns, in its order.

    Attributes:
        info: a dictionary for each map of the network: `num_chs` its channels, `reduction` image pixels for
            one of its own, `module` the part of the network that it comes from, `index` its place.
        out_indices: of the maps that are returned.
    """

    def __init__(self, stages: Sequence[Stage], out_indices: Sequence[int]) -> None:
        self.out_indices = tuple(out_indices)
        self.info: list[dict[str, Any]] = [
            dict(num_chs=stage.channels, reduction=stage.reduction, module=stage.name, index=index)
            for index, stage in enumerate(stages)
        ]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return what `info` has under `key`."""
        one_key = self.get_dicts([key], idx)
        return one_key[key] if isinstance(one_key, dict) else [found[key] for found in one_key]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Return the dictionaries of `info`, with these keys alone where some are given."""
        if isinstance(idx, int):
            found = self.info[idx]
            return found if keys is None else {key: found[key] for key in keys}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        """Return how many maps the network has, returned or not."""
        return len(self.info)


class FeaturePyramid(nn.Module):
    """A network without its head, which returns the last map of each size: see `create_model`.

    Args:
        network: of `create_model`. It stays as it is; the pyramid shares its parts, but for the head.
        out_indices: which of the maps, the finest being 0; negative ones count from the end. A number: the
            last n. None for all.

    Attributes:
        feature_info: a `FeatureInfo` of the maps.
        return_layers: the names of the parts that the returned maps come from, and their indices as strings.
            As of timm's backbones, it may be set to others of `feature_info`; maps come in its order.

    Inputs:
        (B, 3, H, W).

    Returns:
        A list of (B, C, H / reduction, W / reduction), rounded up.

    Raises:
        ValueError: `out_indices` names a map that is not there, one twice, or none.
    """

    def __init__(self, network: Network, out_indices: Sequence[int] | int | None = None) -> None:
        super().__init__()
        stages = network.feature_stages
        count = len(stages)
        if out_indices is None:
            out_indices = count
        indices = range(-out_indices, 0) if isinstance(out_indices, int) else tuple(out_indices)
        places = [i % count for i in indices if -count <= i < count]
        if len(places) < len(indices) or len(set(places)) < max(1, len(places)):
            raise ValueError(
                f"FeaturePyramid: out_indices must be of {count} maps, each at most once, got {out_indices}"
            )
        self.feature_info = FeatureInfo(stages, places)
        self.return_layers = {stages[i].name: str(i) for i in places}
        self.in_channels = network.in_channels
        self.network = copy.copy(network)
        self.network._modules = dict(network._modules)
        for name in network.head_modules:
            self.network._modules.pop(name, None)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.feature_maps(x)
        return [maps[int(i)] for i in self.return_layers.values()]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See the network's."""
        self.network.set_grad_checkpointing(enable)

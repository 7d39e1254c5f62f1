"""iFormer: the network and its released variants."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_tensor
from ..nn import (
    BNLinear,
    ConvBN,
    FusedInvertedBottleneck,
    FusedSequential,
    IFormerClassifier,
    IFormerStage,
    LayerNorm2d,
)
from ..nn.drop_path import growing_rates
from ..nn.inputs import check_channels
from .network import Network, Stage


class IFormer(Network):
    """iFormer, for classification.

    `create_model` makes the released variants; `from_released` takes the released constructor's arguments.

    Args:
        depths: blocks of each of the four stages.
        dims: channels of each stage.
        block_types: a block string for each block, see `IFormerBlock`.
        num_classes: outputs of the classifier.
        in_channels: of the images.
        kernels: of the stem and of the three convolutions that halve the map.
        stem: "FusedIB" (released), "conv_stem" (two convolutions) or "ConvNeXt" (4x4, and a layer norm).
        norm: "batch" (released), or "layer" for layer norms before 2x2 convolutions between the stages and
            before the classifier.
        downsample: whether the map is halved between the stages.
        distillation: whether there is a second head, see `IFormerClassifier`.
        last_projection: a linear layer to twice the channels, and GELU, before the classifier.
        drop_path: rate of stochastic depth of the last block; it grows linearly over the blocks.
        layer_scale: what the residuals' factors begin with; 0 for none.
        form: of `SingleHeadModulationAttention`, "released" or "paper".

    Inputs:
        (B, in_channels, H, W), H and W at least 1; in train mode B at least 2.

    Returns:
        (B, num_classes); with distillation, in train mode, a pair of them.

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Zheng, iFormer, ICLR 2025, section 3 and table 9.
    """

    head_modules = ("norm", "head", "proj", "classifier")

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        block_types: Sequence[str],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        kernels: Sequence[int] = (5, 3, 3, 3),
        stem: str = "FusedIB",
        norm: str = "batch",
        downsample: bool = True,
        distillation: bool = False,
        last_projection: bool = False,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        form: str = "released",
    ) -> None:
        super().__init__()
        for name, values in (("depths", depths), ("dims", dims), ("kernels", kernels)):
            if len(values) != 4:
                raise ValueError(f"IFormer: {name} must have four values, got {tuple(values)}")
        if len(block_types) != sum(depths):
            raise ValueError(
                f"IFormer: block_types must have {sum(depths)} entries for the depths {tuple(depths)}, "
                f"got {len(block_types)}"
            )
        if norm not in ("batch", "layer"):
            raise ValueError(f"IFormer: norm must be 'batch' or 'layer', got {norm!r}")
        self.in_channels = in_channels
        self.downsample_layers = nn.ModuleList([_stem(stem, in_channels, dims[0], kernels[0])])
        for inputs, outputs, kernel in zip(dims, dims[1:], kernels[1:], strict=False):
            self.downsample_layers.append(_halving(downsample, norm, inputs, outputs, kernel))
        self.stages = nn.ModuleList()
        rates, done = growing_rates(drop_path, sum(depths)), 0
        for channels, depth in zip(dims, depths, strict=True):
            part = slice(done, done + depth)
            done += depth
            self.stages.append(
                IFormerStage(
                    channels,
                    list(block_types[part]),
                    drop_path=rates[part],
                    layer_scale=layer_scale,
                    form=form,
                )
            )
        steps = range(4) if downsample else (0,) * 4
        self.feature_stages = tuple(
            Stage(f"stages.{i}", c, 4 << n) for i, (c, n) in enumerate(zip(dims, steps, strict=True))
        )
        if norm == "layer":
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
            self.head = nn.Linear(dims[-1], num_classes)
        else:
            features = dims[-1]
            if last_projection:
                self.proj = BNLinear(features, 2 * features)
                features *= 2
            self.classifier = IFormerClassifier(features, num_classes, distillation=distillation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the released initialisation: convolutions and linear layers N(0, 0.02^2), cut off at 2."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.feature_maps(x)[-1].mean((2, 3))
        if hasattr(self, "head"):
            return self.head(self.norm(x))
        if hasattr(self, "proj"):
            x = F.gelu(self.proj(x))
        return self.classifier(x)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps that the four stages end with, those of `feature_stages`."""
        check_tensor("IFormer", "x", x, "B C H W")
        check_channels("IFormer", x, self.in_channels)
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = self.run(stage, downsample(x))
            maps.append(x)
        return maps

    def fuse(self) -> "IFormer":
        """Fold batch norms, and the residuals of depthwise convolutions, into weights, in place.

        The network computes the same, faster, and cannot be trained any more.

        Returns:
            The network itself.

        Raises:
            RuntimeError: it is in train mode.
        """
        if self.training:
            raise RuntimeError("fuse: the network is in train mode; call eval() first")
        _fuse(self)
        return self

    @classmethod
    def from_released(
        cls,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        head_init_scale: float = 1.0,
        conv_stem_type: str = "FusedIB",
        use_bn: bool = False,
        distillation: bool = False,
        last_proj: bool = False,
        sep_downsample: bool = True,
        block_types: Sequence[str] | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        downsample_kernels: Sequence[int] = (3, 3, 3, 3),
    ) -> "IFormer":
        """Return a network from the released constructor's arguments, with its names and its defaults.

        Raises:
            ValueError: a value with which the released constructor or its network fails, named.
        """
        if block_types is None:
            raise ValueError("from_released: block_types must be a list of block strings, got None")
        if act_layer is not nn.GELU:
            raise ValueError(f"from_released: act_layer must be GELU, got {act_layer.__name__}")
        network = cls(
            depths,
            dims,
            block_types,
            num_classes=num_classes,
            in_channels=in_chans,
            kernels=downsample_kernels,
            stem=conv_stem_type,
            norm="batch" if use_bn else "layer",
            downsample=sep_downsample,
            distillation=distillation,
            last_projection=last_proj,
            drop_path=drop_path_rate,
            layer_scale=layer_scale_init_value,
        )
        if not use_bn:
            with torch.no_grad():
                network.head.weight.mul_(head_init_scale)
        return network


def _stem(kind: str, inputs: int, outputs: int, kernel: int) -> nn.Module:
    half = outputs // 2
    first = ConvBN(inputs, half, kernel, 2, kernel // 2)
    if kind == "FusedIB":
        return FusedSequential(first, nn.GELU(), FusedInvertedBottleneck(half, outputs, kernel, 2))
    if kind == "conv_stem":
        return FusedSequential(first, nn.GELU(), ConvBN(half, outputs, kernel, 2, kernel // 2))
    if kind == "ConvNeXt":
        return nn.Sequential(nn.Conv2d(inputs, outputs, 4, 4), LayerNorm2d(outputs))
    raise ValueError(f"IFormer: stem must be 'FusedIB', 'conv_stem' or 'ConvNeXt', got {kind!r}")


def _halving(downsample: bool, norm: str, inputs: int, outputs: int, kernel: int) -> nn.Module:
    if not downsample:
        return nn.Identity()
    if norm == "batch":
        return nn.Sequential(ConvBN(inputs, outputs, kernel, 2, kernel // 2))
    return nn.Sequential(LayerNorm2d(inputs), nn.Conv2d(inputs, outputs, 2, 2))


def _fuse(module: nn.Module) -> None:
    for name, child in module.named_children():
        fuse: Any = getattr(child, "fuse", None)
        fused = child if fuse is None else fuse()
        if fused is not child:
            module.add_module(name, fused.eval())
        else:
            _fuse(child)


def _block_types(table: str) -> tuple[list[int], list[str]]:
    """Return depths and block strings from, for example, "2C4 2C4 9C4+4A2/3+C4 2A4/3".

    Each stage has kinds and how often they come: `C4` is a ConvBlock of ratio 4; `A2/3` is RepCPE, SHMABlock
    of reduction 2 and FFN2d of ratio 3.
    """
    depths, types = [], []
    for stage in table.split():
        blocks: list[str] = []
        for part in stage.split("+"):
            match = re.fullmatch(r"(\d*)([CA])(\d)(?:/(\d))?", part)
            assert match is not None, part
            count, ratio = int(match[1] or 1), match[3]
            group = [f"ConvBlock_k7_r{ratio}"]
            if match[2] == "A":
                group = ["RepCPE_k3", f"SHMABlock_r1_hdrr{ratio}_act0_nh1", f"FFN2d_r{match[4]}"]
            blocks += group * count
        depths.append(len(blocks))
        types += blocks
    return depths, types


def _in_windows(types: list[str], first: int, end: int, window: int, attended: int) -> list[str]:
    """Return the block strings with the first `attended` attentions of entries first to end-1 in windows."""
    places = [i for i in range(first, end) if types[i].startswith("SHMABlock")][:attended]
    types = list(types)
    types[places[0]] += f"_ws{window}_wsp1"
    types[places[-1]] += f"_ws{window}_wre1"
    return types


# The released models: dims, blocks; layer scale; attentions of the third stage that the released code for
# detection and segmentation runs in windows.
_TABLE: dict[str, tuple[tuple[int, int, int, int], str, float, int]] = {
    "iformer_t": ((32, 64, 128, 256), "2C3 2C3 6C3+3A2/2+C3 2A4/2", 0.0, 0),
    "iformer_s": ((32, 64, 176, 320), "2C4 2C4 9C4+3A2/3+C4 2A4/3", 0.0, 0),
    "iformer_m": ((48, 96, 192, 384), "2C4 2C4 9C4+4A2/3+C4 2A4/3", 0.0, 4),
    "iformer_l": ((48, 96, 256, 384), "2C4 2C4 8C4+8A2/3+C4 2A4/3", 0.0, 7),
    "iformer_l2": ((64, 128, 256, 512), "3C4 3C4 12C4+11A2/3+C4 3A4/3", 0.0, 10),
    "iformer_h": ((96, 192, 384, 768), "5C4 5C4 14C4+15A1/4+C4 6A1/4", 1e-6, 0),
}
# Released for measuring latency only: always in windows of 16.
_FASTER = {
    "iformer_m_faster": "iformer_m",
    "iformer_l_faster": "iformer_l",
    "iformer_l2_faster": "iformer_l2",
}

NAMES = (*_TABLE, *_FASTER)
WITH_WINDOWS = tuple(name for name, (*_, attended) in _TABLE.items() if attended)  # that take `window_size`


def create_iformer(name: str, *, window_size: int | None = None, **options: Any) -> IFormer:
    """Return a released variant; `options` replace its settings or add to them, see `IFormer`.

    `window_size` is that of the attentions in the third stage, which the released code for detection and
    segmentation has at 16.
    """
    dims, table, layer_scale, attended = _TABLE[_FASTER.get(name, name)]
    if name in _FASTER and window_size is None:
        window_size = 16
    if name == "iformer_l2_faster":
        dims = (48, 128, 256, 448)
    depths, types = _block_types(table)
    if window_size is not None:
        if attended == 0:
            raise ValueError(f"create_model: {name} has no form with window_size, got {window_size}")
        types = _in_windows(types, sum(depths[:2]), sum(depths[:3]), window_size, attended)
    return IFormer(depths, dims, types, **(dict(layer_scale=layer_scale) | options))

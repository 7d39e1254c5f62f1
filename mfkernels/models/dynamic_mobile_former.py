"""Dynamic Mobile-Former (DMF): the network and its released variants."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_tensor
from ..nn import (
    DMFBlock,
    DMFFormer,
    DMFHead,
    DMFMobileToFormer,
    DMFStem,
    DynamicResidualConv2d,
    InvertedBottleneck,
    KernelAttention,
)
from ..nn.batch_norm import normalize
from ..nn.drop_path import growing_rates
from ..nn.inputs import check_channels
from .features import last_of_each_size
from .network import Network, Stage

# One block: hidden channels, output channels, stride, heads of Mobile -> Former, kernels of the pointwise
# convolutions and of the depthwise one.
Row = tuple[int, int, int, int, int, int]


class DynamicMobileFormer(Network):
    """Dynamic Mobile-Former, for classification.

    `create_model` makes the released variants; `from_released` takes the released constructor's arguments.

    Args:
        rows: the blocks, (hidden channels, output channels, stride, heads, pointwise kernels, depthwise
            kernels); a convolution with one kernel is a plain one.
        stem_channels, lite_channels: of the stem; hidden and output ones of the first inverted bottleneck.
        features, head_features: outputs of the last convolution, and of the first linear layer.
        num_classes: outputs of the classifier.
        in_channels: of the images.
        token_num, token_dim: T and d, a multiple of 32.
        groups: of the blocks' pointwise convolutions.
        ffn_ratio: of the blocks, see `DMFBlock`.
        dropout: of the tokens' parts and before the classifier.
        drop_path: rate of stochastic depth of the last block but two; it grows linearly over the blocks.
        temperature, activation, basis: of all `DynamicResidualConv2d`; see `set_temperature`.
        mean: of all `GlobalResponseNorm`.

    Inputs:
        (B, in_channels, H, W), H and W at least 1; in train mode B at least 2.

    Returns:
        (B, num_classes).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Yun and Ro, Dynamic Mobile-Former, section 3 and table 1.
    """

    head_modules = ("end_mobile2former", "end_former", "channel_conv", "bn", "head")

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        stem_channels: int,
        lite_channels: tuple[int, int],
        features: int,
        head_features: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        token_num: int = 6,
        token_dim: int = 192,
        groups: int = 4,
        ffn_ratio: float = 3.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        temperature: float = 1.0,
        activation: str = "sigmoid",
        basis: str = "zeros",
        mean: str = "released",
    ) -> None:
        super().__init__()
        if not rows:
            raise ValueError("DynamicMobileFormer: rows must hold at least one block, got none")
        self.in_channels = in_channels
        dynamic: dict[str, Any] = dict(temperature=temperature, activation=activation, basis=basis)
        rates = growing_rates(drop_path, len(rows) + 2)
        self.tokens = nn.Parameter(torch.randn(1, token_num, token_dim))
        self.stem = DMFStem(in_channels, stem_channels)
        self.lite_bottleneck = InvertedBottleneck(stem_channels, *lite_channels)
        self.blocks = nn.ModuleList()
        channels, reduction, stages = lite_channels[1], 2, []
        for index, (hidden, outputs, stride, heads, pointwise, depthwise) in enumerate(rows):
            options = dict(pointwise_kernels=pointwise, depthwise_kernels=depthwise, groups=groups, **dynamic)
            self.blocks.append(
                DMFBlock(
                    channels,
                    hidden,
                    outputs,
                    token_dim=token_dim,
                    stride=stride,
                    num_heads=heads,
                    ffn_ratio=ffn_ratio,
                    dropout=dropout,
                    drop_path=rates[index],
                    mean=mean,
                    **options,
                )
            )
            channels, reduction = outputs, reduction * stride
            stages.append(Stage(f"blocks.{index}", channels, reduction))
        self.feature_stages = last_of_each_size(stages)
        heads, kernels = rows[-1][3], rows[-1][4]
        self.end_mobile2former = DMFMobileToFormer(
            channels, token_dim, num_heads=heads, dropout=dropout, drop_path=rates[-2]
        )
        self.end_former = DMFFormer(token_dim, dropout=dropout, drop_path=rates[-1])
        self.channel_conv = DynamicResidualConv2d(
            channels, features, 1, token_dim=token_dim, num_kernels=kernels, **dynamic
        )
        self.bn = nn.BatchNorm2d(features)
        self.head = DMFHead(features, token_dim, head_features, num_classes, dropout=dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the released initialisation.

        Convolutions are N(0, 2 / (kh kw out)), linear layers N(0, 0.02^2) cut off at 2, tokens N(0, 1);
        dynamic convolutions keep what their constructor drew.
        """
        nn.init.normal_(self.tokens)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def temperature(self) -> float:
        """The temperature of the kernel attentions; all have the same."""
        return next(m.temperature for m in self.modules() if isinstance(m, KernelAttention))

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of all kernel attentions.

        Released networks were trained with one that falls from 30 to 1, see `annealed_temperature`. The
        temperature is no part of the state.

        Raises:
            ValueError: it is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"set_temperature: temperature must be positive, got {temperature}")
        for module in self.modules():
            if isinstance(module, KernelAttention):
                module.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        x, tokens, _ = self._blocks(x)
        tokens = self.end_former(self.end_mobile2former(x, tokens))
        x = normalize(self.bn, self.channel_conv(x, tokens[:, 0]), "gelu")
        return self.head(x, tokens)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the last map of each size, those of `feature_stages`."""
        return self._blocks(x)[2]

    def _blocks(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        check_tensor("DynamicMobileFormer", "x", x, "B C H W")
        check_channels("DynamicMobileFormer", x, self.in_channels)
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        x = self.lite_bottleneck(self.stem(x))
        maps = []
        wanted = {stage.name for stage in self.feature_stages}
        for index, block in enumerate(self.blocks):
            x, tokens = self.run(block, x, tokens)
            if f"blocks.{index}" in wanted:
                maps.append(x)
        return x, tokens, maps

    @classmethod
    def from_released(
        cls,
        num_classes: int = 1000,
        in_chans: int = 3,
        tokens: Sequence[int] = (6, 192),
        mlp_ratio: float = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_drop: float = 0.0,
        qkv_bias: bool = False,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act: type[nn.Module] = nn.GELU,
        params: Mapping[str, Any] | None = None,
    ) -> "DynamicMobileFormer":
        """Return a network from the released constructor's arguments, with its names and its defaults.

        `params` is the released table: "alpha", "stem", "lite_bneck", "block", "channel_conv", "head".

        Raises:
            ValueError: an argument or a value of the table that no released network has, named.
        """
        fixed = {
            "mlp_ratio": (mlp_ratio, 2),
            "attn_drop": (attn_drop, 0.0),
            "qkv_bias": (qkv_bias, False),
            "norm_layer": (norm_layer, nn.LayerNorm),
            "act": (act, nn.GELU),
        }
        for name, (value, expected) in fixed.items():
            if value != expected:
                raise ValueError(f"from_released: {name} must be {expected}, got {value!r}")
        sections = ("stem", "lite_bneck", "block", "channel_conv", "head")
        missing = [name for name in sections if name not in (params or {})]
        if params is None or missing:
            raise ValueError(f"from_released: params lacks {', '.join(missing)}")
        stem, lite, block, last, head = (params[name] for name in sections)
        alpha = params.get("alpha", 1.0)

        def scaled(channels: float) -> int:
            return int(channels * alpha)

        sizes = [stem["kernel_size"], lite["kernel_size"], *block["kernel_sizes"]]
        if any(size != 3 for size in sizes) or lite["fc_groups"] != 1 or lite["stride"] != 1:
            raise ValueError("from_released: kernel sizes must be 3, lite_bneck's fc_groups and stride 1")
        inputs = [lite["out_channels"], *block["out_channels"]]
        if list(block["in_channels"]) != inputs[:-1] or last["in_channels"] != scaled(inputs[-1]):
            raise ValueError("from_released: in_channels must be the out_channels of what comes before")
        columns = ("strides", "num_heads", "fc_Ks", "conv_Ks")
        rows = [
            (scaled(hidden), scaled(outputs), *others)
            for hidden, outputs, *others in zip(
                block["hidden_channels"], block["out_channels"], *(block[c] for c in columns), strict=True
            )
        ]
        return cls(
            rows,  # type: ignore[arg-type]
            stem_channels=scaled(stem["out_channels"]),
            lite_channels=(scaled(lite["hidden_channels"]), scaled(lite["out_channels"])),
            features=last["out_channels"],
            head_features=head["hidden_channels"],
            num_classes=num_classes,
            in_channels=in_chans,
            token_num=tokens[0],
            token_dim=tokens[1],
            groups=block["fc_groups"],
            ffn_ratio=block["ffn_expansion"],
            dropout=drop_rate,
            drop_path=drop_path_rate,
        )


def annealed_temperature(step: int, steps_per_epoch: int, *, epochs: int = 10, start: float = 30.0) -> float:
    """Return the temperature of a training step, for `DynamicMobileFormer.set_temperature`.

    It falls linearly from `start` to 1, which it reaches with the last step of `epochs` and keeps.

    Args:
        step: steps done before, since the beginning of the training.
        steps_per_epoch: steps of an epoch.

    Source: the training script of the released DMF.
    """
    whole = epochs * steps_per_epoch
    return 1.0 + max(0.0, (start - 1.0) * (whole - step - 1) / whole)


# The released models. Blocks: hidden channels, outputs, stride, heads; kernels pointwise, kernels depthwise.
_STRIDES = (2, 1, 2, 1, 2, 1, 1, 1, 2, 1, 1)
_HIDDEN_500 = (144, 120, 240, 216, 432, 512, 768, 1056, 1056, 1440, 1440)
_OUT_500 = (40, 40, 72, 72, 128, 128, 176, 176, 240, 240, 240)
_HEADS_500 = (2, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8)
_FOUR_THEN_EIGHT = (4,) * 8 + (8,) * 3


def _table(
    channels: tuple[int, int, int],
    hidden: Sequence[int],
    outputs: Sequence[int],
    heads: Sequence[int],
    pointwise: Sequence[int],
    depthwise: Sequence[int],
    strides: Sequence[int] = _STRIDES,
    **others: Any,
) -> dict[str, Any]:
    rows = tuple(zip(hidden, outputs, strides, heads, pointwise, depthwise, strict=True))
    return dict(rows=rows, stem_channels=channels[0], lite_channels=channels[1:], **others)


_TABLES: dict[str, dict[str, Any]] = {
    "dmf_96": _table(
        (12, 24, 12), (36, 72, 72, 144, 192, 288, 384, 576), (12, 24, 24, 48, 48, 64, 96, 96),
        (2,) * 7 + (3,), (1,) * 8, (4,) * 6 + (8, 8), (2, 2, 1, 2, 1, 1, 2, 1),
        groups=4, ffn_ratio=4, features=576, head_features=1024,
    ),
    "dmf_198": _table(
        (12, 24, 12), (72, 60, 120, 108, 216, 256, 384, 528, 528, 720, 720),
        (20, 20, 36, 36, 64, 64, 88, 88, 120, 120, 120), (2,) * 7 + (4,) * 4, (8,) * 11, (8,) * 11,
        groups=2, ffn_ratio=3, features=960, head_features=1600,
    ),
    "dmf_285": _table(
        (16, 32, 18), (108, 90, 180, 162, 324, 384, 576, 792, 792, 1080, 1080),
        (30, 30, 54, 54, 96, 96, 132, 132, 180, 180, 180), (2, 2, 2, 2, 2, 3, 3, 4, 4, 6, 6), (8,) * 11,
        (8,) * 11, groups=3, ffn_ratio=2, features=1152, head_features=1920,
    ),
    "dmf_288": _table(
        (16, 32, 16), (96, 96, 144, 192, 288, 384, 576, 768, 768, 1152, 1152),
        (24, 24, 48, 48, 96, 96, 128, 128, 192, 192, 192), (2, 2, 2, 2, 3, 3, 4, 4, 4, 6, 6),
        _FOUR_THEN_EIGHT, _FOUR_THEN_EIGHT,
        groups=4, ffn_ratio=2.8, features=1152, head_features=1920,
    ),
    "dmf_500": _table(
        (24, 48, 24), _HIDDEN_500, _OUT_500, _HEADS_500, (8,) * 11, (8,) * 11,
        groups=4, ffn_ratio=2.7, features=1440, head_features=1920,
    ),
    "dmf_525": _table(
        (24, 48, 24), _HIDDEN_500, _OUT_500, _HEADS_500, _FOUR_THEN_EIGHT, _FOUR_THEN_EIGHT,
        groups=4, ffn_ratio=3, features=1440, head_features=1920,
    ),
    "dmf_615": _table(
        (24, 48, 24), (*_HIDDEN_500, 1536), (*_OUT_500[:10], 256, 256),
        (2,) * 5 + (4,) * 4 + (8,) * 3, (4,) * 9 + (8,) * 3, (4,) * 9 + (8,) * 3, (*_STRIDES, 1),
        groups=4, ffn_ratio=3.5, features=1440, head_features=1920,
    ),
}  # fmt: skip
_TABLES |= {"dmf_xxs": _TABLES["dmf_198"], "dmf_xs": _TABLES["dmf_285"], "dmf_s": _TABLES["dmf_500"]}

NAMES = tuple(_TABLES)


def create_dynamic_mobile_former(name: str, **options: Any) -> DynamicMobileFormer:
    """Return a released variant; `options` replace its settings or add to them, see `DynamicMobileFormer`."""
    return DynamicMobileFormer(**(_TABLES[name] | options))

"""Mobile-Former: the network and the seven released variants."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import check_tensor
from ..nn import (
    ClassifierHead,
    FusedSequential,
    LiteBottleneck,
    MobileFormerBlock,
    MobileFormerDownsample,
    MobileToFormer,
)
from ..nn.inputs import check_channels
from ..nn.padding import Padding, hide
from .features import last_of_each_size
from .network import Network, Stage

# One block: (kind, e1, out_channels, repeat, stride, e2) as in the released tables. Kind "D": the block that
# downsamples, or the lite bottleneck if e2 is 0; "M": the other. The expansions e1 and e2 are of the input
# channels, and of the output channels of "D".
Row = tuple[str, int, int, int, int, int]


class MobileFormer(Network):
    """Mobile-Former, for classification.

    `create_model` makes the released variants; `from_released` takes the released constructor's arguments.

    Args:
        rows: the blocks, (kind, e1, out_channels, repeat, stride, e2); kind "D" (downsample block, or lite
            bottleneck where e2 is 0) or "M".
        num_classes: outputs of the classifier.
        in_channels, stem_channels: of the first convolution.
        features: width of the first linear layer of the head.
        token_dim, token_num: d and T.
        token_id: token for the dynamic activations; -1 for spatial-aware ones.
        image_size: side of the images; matters for position mixing ("mlp") only.
        head_expansion, class_tokens, head_activation, dropout, drop_branch: see `ClassifierHead`.
        drop_path: rate of stochastic depth of the last row; it grows linearly over the rows.
        depthwise: of the "D" blocks, see `MobileFormerDownsample`.
        before_skip: of the "M" blocks, see `MobileFormerBlock`.
        **block: all other arguments of `MobileFormerBlock`.

    Inputs:
        (B, in_channels, H, W), H and W at least 1.

    Returns:
        (B, num_classes).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3 and tables 1, 10 to 13.
    """

    head_modules = ("local_global", "classifier")

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_channels: int = 16,
        features: int = 1280,
        token_dim: int = 128,
        token_num: int = 6,
        token_id: int = 0,
        image_size: int = 224,
        head_expansion: int = 6,
        class_tokens: int = 1,
        head_activation: str = "relu6",
        dropout: float = 0.0,
        drop_branch: tuple[float, float] = (0.0, 0.0),
        drop_path: float = 0.0,
        depthwise: str = "dw",
        before_skip: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        tokens: dict[str, Any] = dict(token_dim=token_dim, token_num=token_num)
        self.tokens = nn.Embedding(token_num, token_dim)
        self.stem = FusedSequential(
            nn.Conv2d(in_channels, stem_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU6(),
        )
        layers: list[nn.Module] = []
        channels, positions = stem_channels, image_size**2 // 4
        reduction, stages = 2, []
        for index, (kind, e1, out_channels, repeat, stride, e2) in enumerate(rows):
            rate = drop_path * (index + 1) / len(rows)
            for i in range(repeat):
                step = stride if i == 0 else 1
                options = dict(token_id=token_id, positions=positions, drop_path=rate, **tokens, **block)
                layers.append(
                    _block(kind, channels, out_channels, step, e1, e2, depthwise, before_skip, options)
                )
                channels, positions = out_channels, positions // step**2
                reduction *= step
                stages.append(Stage(f"features.{len(layers) - 1}", channels, reduction))
        self.features = nn.Sequential(*layers)
        self.feature_stages = last_of_each_size(stages)
        self.local_global = MobileToFormer(
            channels,
            token_dim,
            token_num=token_num,
            positions=positions,
            drop_path=drop_path,
            num_heads=block.get("num_heads", 2),
            gate=block.get("gates", (True,))[0],
            mixing=block.get("mixing", "attn"),
        )
        self.classifier = ClassifierHead(
            channels,
            num_classes,
            features=features,
            token_dim=token_dim,
            expansion=head_expansion,
            groups=block.get("groups", 1),
            class_tokens=class_tokens,
            activation=head_activation,
            token_id=token_id,
            hyper_reduction=block.get("hyper_reduction", 4),
            dropout=dropout,
            drop_branch=drop_branch,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the released initialisation: convolutions N(0, 2 / (kh kw out)), linear N(0, 0.01^2)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / outputs))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x, tokens, _ = self._blocks(x)
        tokens, _ = self.local_global(x, tokens, return_logits=False)
        return self.classifier(x, tokens)

    def feature_maps(self, x: Tensor, padding: Padding | None = None) -> list[Tensor]:
        """Return the last map of each size, those of `feature_stages`.

        The padding, if there is any, holds zeros.
        """
        return self._blocks(x, padding)[2]

    def _blocks(self, x: Tensor, padding: Padding | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        check_tensor("MobileFormer", "x", x, "B C H W")
        check_channels("MobileFormer", x, self.in_channels)
        tokens = self.tokens.weight[:, None].expand(-1, x.shape[0], -1).contiguous()
        x, maps = hide(self.stem(hide(x, padding)), padding), []
        wanted = {stage.name for stage in self.feature_stages}
        for index, block in enumerate(self.features):
            inputs = ((x, tokens),) if padding is None else (x, tokens, padding)
            x, tokens = self.run(block, *inputs)
            if f"features.{index}" in wanted:
                maps.append(x)
        return x, tokens, maps

    @classmethod
    def from_released(
        cls,
        block_args: Sequence[Sequence[Any]],
        num_classes: int = 1000,
        img_size: int = 224,
        width_mult: float = 1.0,
        in_chans: int = 3,
        stem_chs: int = 16,
        num_features: int = 1280,
        dw_conv: str = "dw",
        kernel_size: tuple[int, int] = (3, 3),
        cnn_exp: tuple[int, int] = (6, 4),
        group_num: int = 1,
        se_flag: Sequence[int] = (2, 0, 2, 0),
        hyper_token_id: int = 0,
        hyper_reduction_ratio: int = 4,
        token_dim: int = 128,
        token_num: int = 6,
        cls_token_num: int = 1,
        last_act: str = "relu",
        last_exp: int = 6,
        gbr_type: str = "mlp",
        gbr_dynamic: Sequence[bool] = (False, False, False),
        gbr_norm: str = "post",
        gbr_ffn: bool = False,
        gbr_before_skip: bool = False,
        gbr_drop: Sequence[float] = (0.0, 0.0),
        mlp_token_exp: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        cnn_drop_path_rate: float = 0.0,
        attn_num_heads: int = 2,
        remove_proj_local: bool = True,
    ) -> "MobileFormer":
        """Return a network from the released constructor's arguments, with its names and its defaults.

        `block_args` are rows (kind, e1, channels, repeat, stride, e2), kind "DnaBlock3" or "DnaBlock".
        `cnn_exp`, `gbr_norm` and `cnn_drop_path_rate` have no effect, as in the released code.

        Raises:
            ValueError: a value with which the released constructor or its network fails, named.
        """
        rows: list[Row] = []
        for index, row in enumerate(block_args):
            kind, e1, channels, repeat, stride, e2 = row
            if kind not in ("DnaBlock", "DnaBlock3"):
                raise ValueError(
                    f"from_released: block_args[{index}] must begin with 'DnaBlock' or 'DnaBlock3', "
                    f"got {kind!r}"
                )
            divisor = 8 if width_mult > 1.01 and index > 0 else 4
            width = _make_divisible(channels * width_mult, divisor)
            rows.append(("M" if kind == "DnaBlock" else "D", e1, width, repeat, stride, e2))
        if last_act not in ("relu", "dyrelu"):
            raise ValueError(f"from_released: last_act must be 'relu' or 'dyrelu', got {last_act!r}")
        return cls(
            rows,
            num_classes=num_classes,
            in_channels=in_chans,
            stem_channels=stem_chs,
            features=num_features,
            token_dim=token_dim,
            token_num=token_num,
            token_id=hyper_token_id,
            image_size=img_size,
            head_expansion=last_exp,
            class_tokens=cls_token_num,
            head_activation="dynamic_relu" if last_act == "dyrelu" else "relu6",
            dropout=drop_rate,
            drop_branch=(gbr_drop[0], gbr_drop[1]),
            drop_path=drop_path_rate,
            depthwise=dw_conv,
            before_skip=gbr_before_skip,
            se_flag=tuple(se_flag),
            hyper_reduction=hyper_reduction_ratio,
            groups=group_num,
            kernel_size=tuple(kernel_size),
            num_heads=attn_num_heads,
            gates=tuple(gbr_dynamic),
            ffn=gbr_ffn,
            mixing=gbr_type,
            mlp_expansion=mlp_token_exp,
            local_projection=not remove_proj_local,
        )


def _block(
    kind: str,
    inputs: int,
    outputs: int,
    stride: int,
    e1: int,
    e2: int,
    depthwise: str,
    before_skip: bool,
    options: dict[str, Any],
) -> nn.Module:
    if e1 == 1 or e2 == 0:
        if kind == "M" and stride == 1 and inputs == outputs:
            raise ValueError(
                "MobileFormer: a row of kind 'M' in its lite form (e1 = 1 or e2 = 0) cannot have a residual; "
                "use kind 'D'"
            )
        return LiteBottleneck(
            inputs,
            outputs,
            stride,
            expansion=e1,
            groups=options.get("groups", 1),
            depthwise=depthwise if kind == "D" else "dw",
        )
    if kind == "D":
        return MobileFormerDownsample(
            inputs, outputs, stride, expansion=(e1, e2), depthwise=depthwise, **options
        )
    if kind == "M":
        return MobileFormerBlock(inputs, outputs, stride, expansion=e1, before_skip=before_skip, **options)
    raise ValueError(f"MobileFormer: the kind of a row must be 'D' or 'M', got {kind!r}")


def _make_divisible(channels: float, divisor: int) -> int:
    """Return the nearest multiple of `divisor`, but not less than 90 % of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _row(text: str, channels: int, stride: int = 1) -> Row:
    """Return a row from "D6", "M4" or "lite2"; all released downsample blocks have e2 = 4."""
    kind, e1 = text[:-1], int(text[-1])
    if kind == "lite":
        return ("D", e1, channels, 1, stride, 0)
    return (kind, e1, channels, 1, stride, 4 if kind == "D" else e1)


def _rows(table: str) -> tuple[Row, ...]:
    """Rows from "D6:40/2 M3:40": kind and e1, channels, stride if it is not 1."""
    rows = []
    for word in table.split():
        text, rest = word.split(":")
        channels, _, stride = rest.partition("/")
        rows.append(_row(text, int(channels), int(stride or 1)))
    return tuple(rows)


# The released models: stem channels, T, d, features, groups, blocks.
_SMALL = "lite3:12/2 M3:12 D6:24/2 M3:24 D6:48/2 M4:48 M6:64 D6:96/2 M6:96"
_TABLE: dict[str, tuple[int, int, int, int, int, str]] = {
    "mobile_former_26m": (8, 3, 128, 1024, 4, _SMALL),
    "mobile_former_52m": (8, 3, 128, 1024, 1, _SMALL),
    "mobile_former_96m": (
        12, 4, 128, 1280, 1,
        "lite2:12 D6:16/2 D6:32/2 M3:32 D6:64/2 M4:64 M6:88 D6:128/2 M6:128",
    ),
    "mobile_former_151m": (
        12, 6, 192, 1280, 1,
        "lite2:12 D6:16/2 M3:16 D6:32/2 M3:32 D6:64/2 M4:64 M6:88 M6:88 D6:128/2 M6:128 M6:128",
    ),
    "mobile_former_214m": (
        12, 6, 192, 1600, 1,
        "lite2:12 D6:20/2 M3:20 D6:40/2 M4:40 D6:80/2 M4:80 M6:112 M6:112 D6:160/2 M6:160 M6:160",
    ),
    "mobile_former_294m": (
        16, 6, 192, 1920, 1,
        "lite2:16 D6:24/2 M4:24 D6:48/2 M4:48 D6:96/2 M4:96 M6:128 M6:128 D6:192/2 M6:192 M6:192",
    ),
    "mobile_former_508m": (
        24, 6, 192, 1920, 1,
        "lite2:24 D6:40/2 M3:40 D6:72/2 M3:72 D6:128/2 M4:128 M6:176 M6:176 D6:240/2 M6:240 M6:240",
    ),
}  # fmt: skip

NAMES = tuple(_TABLE)


def create_mobile_former(name: str, **options: Any) -> MobileFormer:
    """Return a released variant; `options` replace its settings or add to them, see `MobileFormer`."""
    stem, token_num, token_dim, features, groups, table = _TABLE[name]
    settings: dict[str, Any] = dict(
        stem_channels=stem, token_num=token_num, token_dim=token_dim, features=features, groups=groups
    )
    return MobileFormer(_rows(table), **(settings | options))

"""The blocks of iFormer, under the names of its released code and by its block strings."""

import re
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_tensor
from .conv_bn import ConvBN
from .fused_sequential import FusedSequential
from .modulation_attention import SingleHeadModulationAttention
from .reparameterized_depthwise import ReparameterizedDepthwise
from .residual import Residual


class ConvBlock(nn.Module):
    """Depthwise convolution, pointwise, GELU, pointwise, each convolution with its batch norm; residual.

    Args:
        channels: C.
        kernel_size: of the depthwise convolution.
        ratio: hidden channels over C.
        reparameterized: train the depthwise convolution as a `ReparameterizedDepthwise`.
        drop_path, layer_scale: of the `Residual`.

    State: the released `ConvBlock`.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        ratio: int = 4,
        reparameterized: bool = False,
        **residual: Any,
    ) -> None:
        super().__init__()
        depthwise = (
            ReparameterizedDepthwise(channels)
            if reparameterized
            else ConvBN(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels)
        )
        hidden = ratio * channels
        layers = FusedSequential(depthwise, ConvBN(channels, hidden), nn.GELU(), ConvBN(hidden, channels))
        self.token_channel_mixer = Residual(layers, channels=channels, **residual)

    def forward(self, x: Tensor) -> Tensor:
        return self.token_channel_mixer(x)


class SHMABlock(nn.Module):
    """`SingleHeadModulationAttention` with its residual.

    Args:
        channels: C.
        drop_path, layer_scale: of the `Residual`.
        **attention: all other arguments of `SingleHeadModulationAttention`.

    State: the released `SHMABlock`.
    """

    def __init__(
        self, channels: int, *, drop_path: float = 0.0, layer_scale: float = 0.0, **attention: Any
    ) -> None:
        super().__init__()
        mixer = SingleHeadModulationAttention(channels, **attention)
        self.token_channel_mixer = Residual(
            mixer, channels=channels, drop_path=drop_path, layer_scale=layer_scale
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.token_channel_mixer(x)


class FFN2d(nn.Module):
    """Two pointwise convolutions with batch norms, GELU between; residual.

    Args:
        channels: C.
        ratio: hidden channels over C.
        drop_path, layer_scale: of the `Residual`.

    State: the released `FFN2d`.
    """

    def __init__(self, channels: int, *, ratio: int = 4, **residual: Any) -> None:
        super().__init__()
        layers = FusedSequential(
            ConvBN(channels, ratio * channels), nn.GELU(), ConvBN(ratio * channels, channels)
        )
        self.channel_mixer = Residual(layers, channels=channels, **residual)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(x)


class RepCPE(nn.Module):
    """Add a conditional positional encoding: a depthwise convolution with batch norm.

    The residual is never dropped or scaled.

    Args:
        channels: C.
        kernel_size: of the convolution.

    State: the released `RepCPE`.
    """

    def __init__(self, channels: int, *, kernel_size: int = 3) -> None:
        super().__init__()
        self.cpe = Residual(
            ConvBN(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels), channels=channels
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cpe(x)


# What a released block string may say of a block: letters, and what becomes of their number.
_WORDS = {
    "ConvBlock": {"k": "kernel_size", "r": "ratio", "reparam": "reparameterized"},
    "SHMABlock": {"r": "ratio", "hdrr": "reduction", "nh": "num_heads", "ws": "window_size"},
    "FFN2d": {"r": "ratio"},
    "RepCPE": {"k": "kernel_size"},
}
# What the released blocks are where their string does not say it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SHMABlock": dict(ratio=4, reduction=4),
    "RepCPE": dict(kernel_size=7),
}
_KINDS: dict[str, Any] = {"ConvBlock": ConvBlock, "SHMABlock": SHMABlock, "FFN2d": FFN2d, "RepCPE": RepCPE}


class IFormerBlock(nn.Module):
    """A block from a released block string.

    Args:
        channels: C.
        block_type: `Name_word_word...`, for example "ConvBlock_k7_r4" or "SHMABlock_r1_hdrr2_act0_nh1".
            Words: `k` kernel, `r` ratio, `hdrr` reduction, `nh` heads, `ws` window, `reparam1`; `wsp1` and
            `wre1`, see `IFormerStage`; `fa1` the logits' factor of one head; `act0` nothing.
        drop_path, layer_scale: of the `Residual`.
        form: of `SingleHeadModulationAttention`.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a block string that cannot be read, named.

    State: the released `BasicBlock`: `block.*`.
    Source: Zheng, iFormer, ICLR 2025, figure 2 and table 9.
    """

    def __init__(
        self,
        channels: int,
        block_type: str,
        *,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        form: str = "released",
    ) -> None:
        super().__init__()
        name, *words = block_type.split("_")
        if name not in _KINDS:
            raise ValueError(
                f"IFormerBlock: block_type must begin with {', '.join(_KINDS)}, got {block_type!r}"
            )
        options: dict[str, Any] = dict(_DEFAULTS.get(name, {}))
        flags = dict.fromkeys(("wsp", "wre", "fa"), False)
        for word in words:
            match = re.fullmatch(r"([a-z]+)(\d+)", word)
            key, value = (match[1], int(match[2])) if match else (word, -1)
            if key in _WORDS[name] and value >= 0:
                options[_WORDS[name][key]] = value
            elif name == "SHMABlock" and key in flags and value in (0, 1):
                flags[key] = bool(value)
            elif (key, value) != ("act", 0):
                raise ValueError(f"IFormerBlock: cannot read {word!r} in block_type {block_type!r}")
        if name != "RepCPE":
            options |= dict(drop_path=drop_path, layer_scale=layer_scale)
        self.split = self.join = 0  # the window that the map is cut into before, and joined from after
        if name == "SHMABlock":
            window = options.pop("window_size", 0)
            if (flags["wsp"] or flags["wre"]) and window < 1:
                raise ValueError(
                    f"IFormerBlock: a window must be given with 'ws' in block_type {block_type!r}"
                )
            self.split, self.join = window * flags["wsp"], window * flags["wre"]
            inside = None if self.split or self.join else window or None
            options |= dict(window_size=inside, form=form)
            if flags["fa"]:
                options["num_heads"] = 1
        if "reparameterized" in options:
            options["reparameterized"] = bool(options["reparameterized"])
        self.block = _KINDS[name](channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class IFormerStage(nn.Sequential):
    """Blocks one after the other.

    From a block with `wsp1` to the next one with `wre1` the map is cut into windows, which the blocks see as
    maps of their own: convolutions find zeros at their borders, too. Maps that windows do not divide are
    padded with zeros at the right and the bottom.

    Args:
        channels: C.
        block_types: see `IFormerBlock`.
        drop_path: a rate for each block.
        **options: all other arguments of `IFormerBlock`.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a block string that cannot be read, or windows that are not put together again.
    """

    def __init__(
        self, channels: int, block_types: list[str], *, drop_path: list[float] | None = None, **options: Any
    ) -> None:
        rates = drop_path or [0.0] * len(block_types)
        super().__init__(
            *(
                IFormerBlock(channels, block_type, drop_path=rate, **options)
                for block_type, rate in zip(block_types, rates, strict=True)
            )
        )
        marks = [mark for block in self._blocks() for mark in (block.split, -block.join) if mark]
        if marks[1::2] != [-mark for mark in marks[::2]] or any(mark < 0 for mark in marks[::2]):
            raise ValueError(
                "IFormerStage: every 'wsp1' in block_types needs a 'wre1' after it, with the same window, "
                f"got {', '.join(block_types)}"
            )

    def _blocks(self) -> list[IFormerBlock]:
        return list(self)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("IFormerStage", "x", x, "B C H W")
        size = x.shape[2:]
        for block in self._blocks():
            if block.split:
                size = x.shape[2:]
                x = split_windows(x, block.split)
            x = block(x)
            if block.join:
                x = join_windows(x, size[0], size[1])
        return x


def split_windows(x: Tensor, window: int) -> Tensor:
    """(B, C, H, W) to (B * windows, C, window, window), windows row by row, the sample slowest."""
    x = F.pad(x, (0, -x.shape[3] % window, 0, -x.shape[2] % window))
    rows, columns = x.shape[2] // window, x.shape[3] // window
    x = x.unflatten(2, (rows, window)).unflatten(4, (columns, window))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Return what `split_windows` made of a map of this size, as it was."""
    window = x.shape[2]
    rows, columns = -(-height // window), -(-width // window)
    x = x.unflatten(0, (x.shape[0] // (rows * columns), rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]

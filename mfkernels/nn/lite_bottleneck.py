from torch import Tensor, nn

from ..checks import check_tensor
from .depthwise import depthwise_layers, pointwise_layers
from .fused_sequential import FusedSequential
from .inputs import Pair, check_channels
from .padding import Padding, hide


class LiteBottleneck(nn.Module):
    """Depthwise 3x3 convolution to `expansion` times the channels, relu6, 1x1 convolution; no attention.

    Args:
        in_channels, out_channels, stride: with stride 1 and equal channels the input is added.
        expansion: hidden channels / in_channels.
        groups: of the 1x1 convolution; with more than one, channels are shuffled before it.
        depthwise: "dw", or "sepdw" for a 3x1 and a 1x3 convolution.

    Inputs, returns:
        x (B, C, H, W), or a pair (x, tokens) of which the tokens pass through. `padding`: see
        `MobileFormerBlock`.

    Raises:
        ValueError: an argument or input that does not fit, named.

    State: the released blocks with a second expansion of 0.
    Source: Chen et al., Mobile-Former, CVPR 2022, table 1 ("bneck-lite").
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        expansion: int,
        groups: int = 1,
        depthwise: str = "dw",
    ) -> None:
        super().__init__()
        if depthwise not in ("dw", "sepdw"):
            raise ValueError(f"LiteBottleneck: depthwise must be 'dw' or 'sepdw', got {depthwise!r}")
        hidden = in_channels * expansion
        self.in_channels = in_channels
        self.skip = stride == 1 and in_channels == out_channels
        self.conv = FusedSequential(
            *depthwise_layers(in_channels, hidden, 3, stride, depthwise),
            nn.ReLU6(),
            nn.ChannelShuffle(in_channels) if groups > 1 else nn.Identity(),
            *pointwise_layers(hidden, out_channels, groups),
        )

    def forward(
        self, x: Tensor | Pair, tokens: Tensor | None = None, padding: Padding | None = None
    ) -> Tensor | Pair:
        if isinstance(x, (tuple, list)):
            x, tokens = x
        check_tensor("LiteBottleneck", "x", x, "B C H W")
        check_channels("LiteBottleneck", x, self.in_channels)
        out = self.conv(x)
        if self.skip:
            out = out + x
        out = hide(out, padding)
        return out if tokens is None else (out, tokens)

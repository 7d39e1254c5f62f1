from typing import Any

from torch import Tensor, nn

from ..checks import check_shape, check_tensor
from ..streams import side_by_side
from .batch_norm import normalize
from .dmf_tokens import DMFFormer, DMFMobileToFormer
from .drop_path import DropPath
from .dynamic_conv2d import DynamicResidualConv2d
from .fused_sequential import FusedSequential
from .inputs import check_channels, untouched
from .inverted_residual_ffn import InvertedResidualFFN
from .kernel_attention import KernelAttention
from .pointwise_conv_bn import conv_norm
from .replacement import Replacement


class DynamicMobile(Replacement):
    """Run the Mobile of a DMF block, an inverted bottleneck of dynamic convolutions.

    With stride 2 a depthwise convolution before it halves the map. It has no residual.

    Args:
        in_channels, hidden_channels, out_channels: of the convolutions.
        token_dim: d.
        stride: 1 or 2.
        kernel_size: of the depthwise convolutions.
        groups: of the pointwise ones.
        pointwise_kernels, depthwise_kernels: K; a convolution with K = 1 is a plain one.
        temperature, activation, basis: of `DynamicResidualConv2d`.

    Inputs:
        x (B, C, H, W) and token (B, d).

    Returns:
        (B, O, H', W').

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `DY_Mobile`.
    Source: Yun and Ro, Dynamic Mobile-Former, section 3.2 and figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        token_dim: int,
        stride: int = 1,
        kernel_size: int = 3,
        groups: int = 1,
        pointwise_kernels: int = 8,
        depthwise_kernels: int = 8,
        **dynamic: Any,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"DynamicMobile: stride must be 1 or 2, got {stride}")
        self.in_channels, self.token_dim = in_channels, token_dim
        hidden, padding = hidden_channels, kernel_size // 2
        if stride == 2:
            halve = nn.Conv2d(in_channels, in_channels, kernel_size, 2, padding, groups=in_channels)
            self.downsample = FusedSequential(halve, nn.BatchNorm2d(in_channels), nn.GELU())

        def conv(inputs: int, outputs: int, size: int, groups: int, kernels: int) -> nn.Module:
            if kernels <= 1:
                return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
            return DynamicResidualConv2d(
                inputs, outputs, size, token_dim=token_dim, num_kernels=kernels, groups=groups, **dynamic
            )

        self.dynamic = (pointwise_kernels > 1, depthwise_kernels > 1, pointwise_kernels > 1)
        self.pw_conv1 = conv(in_channels, hidden, 1, groups, pointwise_kernels)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.dw_conv = conv(hidden, hidden, kernel_size, hidden, depthwise_kernels)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.pw_conv2 = conv(hidden, out_channels, 1, groups, pointwise_kernels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        return self.finish(*self.begin(x), token)

    def begin(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute what does not depend on the token: the halved map, and its mean for the kernels."""
        check_tensor("DynamicMobile", "x", x, "B C H W")
        check_channels("DynamicMobile", x, self.in_channels)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        first: Any = self.pw_conv1  # whose attention may be one of somebody else's
        takes = untouched(first, DynamicResidualConv2d) and untouched(first.Kernel_Attention, KernelAttention)
        return x, (x.mean((2, 3), keepdim=True),) if takes else ()

    def finish(self, x: Tensor, mean: tuple[Tensor, ...], token: Tensor) -> Tensor:
        """Compute the rest of the block, from the token on."""
        check_tensor("DynamicMobile", "token", token, "B d")
        check_shape("DynamicMobile", "token", token, "B d", (x.shape[0], self.token_dim))

        layers = (self.pw_conv1, self.bn1), (self.dw_conv, self.bn2), (self.pw_conv2, self.bn3)
        for (conv, norm), dynamic, activation in zip(
            layers, self.dynamic, ("gelu", "gelu", "none"), strict=True
        ):
            if dynamic:
                x = normalize(norm, conv(x, token, *mean), activation)
            else:
                x = conv_norm(conv, norm, x, activation)
            mean = ()
        return x


class DMFBlock(nn.Module):
    """Mobile -> Former, Former, the Mobile that the first token drives, and the feed-forward part.

    Args:
        in_channels, hidden_channels, out_channels, stride: of the `DynamicMobile`.
        token_dim: d, a multiple of 32.
        num_heads: of the `DMFMobileToFormer`.
        ffn_ratio: R; hidden channels of the `InvertedResidualFFN` over its channels.
        dropout: of the tokens' parts.
        drop_path: rate of stochastic depth.
        mean: of the `GlobalResponseNorm`.
        **mobile: all other arguments of `DynamicMobile`.

    Inputs:
        x (B, C, H, W) and tokens (B, T, d).

    Returns:
        x (B, O, H', W') and tokens (B, T, d).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `Block`.
    Source: Yun and Ro, Dynamic Mobile-Former, section 3.2 and figure 2.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        token_dim: int,
        stride: int = 1,
        num_heads: int = 2,
        ffn_ratio: float = 3.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        mean: str = "released",
        **mobile: Any,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, out_channels)
        self.dynamic_mobile = DynamicMobile(
            in_channels, hidden_channels, out_channels, token_dim=token_dim, stride=stride, **mobile
        )
        self.former = DMFFormer(token_dim, dropout=dropout, drop_path=drop_path)
        self.mobile2former = DMFMobileToFormer(
            in_channels, token_dim, num_heads=num_heads, dropout=dropout, drop_path=drop_path
        )
        self.ffn = InvertedResidualFFN(out_channels, out_channels * ffn_ratio, mean=mean)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        def former() -> Tensor:
            return self.former(self.mobile2former(x, tokens))

        if untouched(self.dynamic_mobile, DynamicMobile):
            new, begun = side_by_side(former, lambda: self.dynamic_mobile.begin(x), x, tokens)
            x = self.dynamic_mobile.finish(*begun, new[:, 0])
        else:
            new = former()
            x = self.dynamic_mobile(x, new[:, 0])
        return x + self.drop_path(self.ffn(self.norm(x))), new

import torch
from torch import Tensor, nn

from .batch_norm import normalize
from .pointwise_conv_bn import conv_norm
from .replacement import Replacement


class ConvBN(Replacement):
    """A convolution without bias and its batch norm, under the names of the released iFormer: `c` and `bn`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as of `nn.Conv2d`.

    Inputs:
        x (B, C, H, W), and the activation after the batch norm: "none" or "gelu".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        return conv_norm(self.c, self.bn, x, activation)

    def fuse(self) -> nn.Conv2d:
        """One convolution with bias that does the work of both in eval mode."""
        scale, shift = affine(self.bn)
        weight = self.c.weight * scale.view(-1, 1, 1, 1)
        return conv_like(self.c, weight, shift)


class BNConv(nn.Module):
    """A batch norm and a 1x1 convolution after it: `bn` and `c`.

    Args:
        in_channels, out_channels: of the convolution, which has no bias.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.c = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(normalize(self.bn, x))

    def fuse(self) -> nn.Conv2d:
        """One convolution with bias that does the work of both in eval mode."""
        scale, shift = affine(self.bn)
        return conv_like(
            self.c, self.c.weight * scale.view(1, -1, 1, 1), self.c.weight.flatten(1).double() @ shift
        )


class BNLinear(nn.Module):
    """A batch norm and a linear layer after it, as in the released iFormer's classifier: `bn` and `l`.

    Args:
        in_features, out_features: of the linear layer.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.l = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    def fuse(self) -> nn.Linear:
        """One linear layer that does the work of both in eval mode."""
        scale, shift = affine(self.bn)
        fused = nn.utils.skip_init(
            nn.Linear,
            self.l.in_features,
            self.l.out_features,
            device=self.l.weight.device,
            dtype=self.l.weight.dtype,
        )
        with torch.no_grad():
            fused.weight.copy_(self.l.weight * scale)
            fused.bias.copy_(self.l.bias + self.l.weight.double() @ shift)
        return fused


def affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return, in float64, each channel's factor and summand that a batch norm in eval mode amounts to.

    Raises:
        RuntimeError: it is in train mode, where it amounts to no such thing.
    """
    if norm.training:
        raise RuntimeError("fuse: the batch norm is in train mode; call eval() first")
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution with these weights and otherwise the settings of `conv`.

    Where the kernel has grown, the padding keeps the map's size.
    """
    grown = (weight.shape[2] - conv.kernel_size[0]) // 2
    assert not isinstance(conv.padding, str)
    fused = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        (weight.shape[2], weight.shape[3]),
        conv.stride,
        (conv.padding[0] + grown, conv.padding[1] + grown),
        groups=conv.groups,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        fused.weight.copy_(weight)
        assert fused.bias is not None
        fused.bias.copy_(bias)
    return fused

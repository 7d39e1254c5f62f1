from torch import Tensor, nn

from .batch_norm import normalize
from .conv_bn import ConvBN
from .inputs import untouched
from .pointwise_conv_bn import conv_norm
from .replacement import Replacement


class FusedSequential(Replacement, nn.Sequential):
    """An `nn.Sequential` that runs its batch norms by our kernels, each with the GELU after it.

    Args:
        layers: as of `nn.Sequential`.

    Inputs:
        x (B, C, H, W).

    Returns:
        What the layers make of it, one after the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        return run_layers(x, *self)


def run_layers(x: Tensor, *layers: nn.Module) -> Tensor:
    """One after the other, but a convolution, the batch norm after it and the GELU after that together."""
    left = list(layers)
    while left:
        layer, conv = left.pop(0), None
        if type(layer) is nn.Conv2d and left and isinstance(left[0], nn.BatchNorm2d):
            layer, conv = left.pop(0), layer
        activation = "none"
        if left and _is_gelu(left[0]) and _takes_activation(layer):
            left.pop(0)
            activation = "gelu"
        if conv is not None:
            x = conv_norm(conv, layer, x, activation)
        elif isinstance(layer, nn.BatchNorm2d):
            x = normalize(layer, x, activation)
        else:
            x = layer(x) if activation == "none" else layer(x, activation)
    return x


def _is_gelu(layer: nn.Module) -> bool:
    return isinstance(layer, nn.GELU) and untouched(layer, nn.GELU) and layer.approximate == "none"


def _takes_activation(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm2d) or untouched(layer, ConvBN)

from torch import Tensor, nn

from .batch_norm import normalize
from .conv_bn import ConvBN
from .inputs import has_hooks


class FusedSequential(nn.Sequential):
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
    """One after the other, a GELU together with the batch norm before it."""
    done = False  # with the layer before
    for layer, following in zip(layers, (*layers[1:], None), strict=True):
        if done:
            done = False
            continue
        done = _is_gelu(following) and _takes_activation(layer)
        if isinstance(layer, nn.BatchNorm2d):
            x = normalize(layer, x, "gelu" if done else "none")
        else:
            x = layer(x, "gelu") if done else layer(x)
    return x


def _is_gelu(layer: nn.Module | None) -> bool:
    return type(layer) is nn.GELU and layer.approximate == "none" and not has_hooks(layer)


def _takes_activation(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm2d) or (isinstance(layer, ConvBN) and not has_hooks(layer))

"""Batch norms as a part of the convolutions before them."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..nn.inputs import untouched


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """In place, those that follow a convolution in an `nn.Sequential`."""
    for layers in model.modules():
        if not isinstance(layers, nn.Sequential):
            continue
        for i in range(1, len(layers)):
            conv, norm = layers[i - 1], layers[i]
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                layers[i - 1], layers[i] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model


def folded(layers: Iterable[nn.Module]) -> nn.Conv2d | None:
    """Return an `nn.Sequential`'s convolution with its batch norm folded; None where it has other parts."""
    conv, *rest = layers
    if not isinstance(conv, nn.Conv2d) or any(type(layer) is not nn.Identity for layer in rest):
        return None
    return conv if untouched(conv, nn.Conv2d) and conv.bias is not None else None

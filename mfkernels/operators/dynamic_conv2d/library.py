import torch
from torch import Tensor

from ..layout import like_map


def pointwise_by_library(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    basis_bias: Tensor | None,
    groups: int,
    basis_scale: float,
) -> Tensor:
    """`mfkernels.ops.dynamic_conv2d` of 1x1 kernels by PyTorch's matrix products: the kernels of the batch
    mixed at once, and a product for each sample and group. Our C++ kernels take up to five times as long."""
    batch, _, height, width = x.shape
    outputs, inputs, *_ = weight.shape
    mixed = weight + basis_scale * (attention @ basis.flatten(1)).view(batch, *weight.shape)
    matrices = mixed.view(batch * groups, outputs // groups, inputs)
    y = torch.bmm(matrices, x.reshape(batch * groups, inputs, height * width))
    y = y.view(batch, outputs, height, width)
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1)
    if basis_bias is not None:
        y = y + (attention @ basis_bias)[..., None, None]
    return like_map(y, x)

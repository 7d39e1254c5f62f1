import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import Pair


def dynamic_conv2d_by_library(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    basis_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    basis_scale: float,
) -> Tensor:
    """`mfkernels.ops.dynamic_conv2d` by PyTorch's own operators: the kernels mixed by a matrix product, then
    products of matrices or one convolution, of which the samples are groups."""
    batch, _, height, width = x.shape
    outputs, inputs, *kernel = weight.shape
    mixed = torch.addmm(weight.flatten(), attention, basis.flatten(1), alpha=basis_scale)
    biases = bias
    if basis_bias is not None:
        biases = attention @ basis_bias if bias is None else torch.addmm(bias, attention, basis_bias)
    elif bias is not None:
        biases = bias.expand(batch, -1)
    if kernel == [1, 1] and stride == (1, 1) and padding == (0, 0):
        matrices = mixed.view(batch * groups, outputs // groups, inputs)
        y = (matrices @ x.reshape(batch * groups, inputs, height * width)).view(batch, outputs, height, width)
        return y if biases is None else y + biases[..., None, None]
    mixed, together = mixed.view(-1, inputs, *kernel), x.reshape(1, -1, height, width)
    inside = None if biases is None else biases.flatten()
    y = F.conv2d(together, mixed, inside, stride, padding, dilation, groups * batch)
    return y.view(batch, outputs, *y.shape[2:])

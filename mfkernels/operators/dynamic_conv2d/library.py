import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import Pair

# PyTorch's convolution adds all products of an output one after the other: of many the rounding error is
# like that of a product of matrices, which is what the definition has.
LONGEST_SUM = 300


def parts_of(inputs: int, taps: int) -> int:
    """Return the number of equal parts of the inputs that are convolved separately.

    So their sums are short.
    """
    return next(
        (n for n in range(1, inputs) if inputs % n == 0 and inputs // n * taps <= LONGEST_SUM), inputs
    )


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
    """Compute `mfkernels.ops.dynamic_conv2d` by PyTorch's own operators.

    A matrix product mixes the kernels. Then come products of matrices, or one convolution whose groups are
    the samples, and parts of their inputs.
    """
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
    parts = parts_of(inputs, kernel[0] * kernel[1])
    mixed = mixed.view(batch, groups, outputs // groups, parts, inputs // parts, *kernel).transpose(2, 3)
    inside = biases.flatten() if biases is not None and parts == 1 else None
    y = F.conv2d(
        x.reshape(1, -1, height, width),
        mixed.reshape(-1, inputs // parts, *kernel),
        inside,
        *(stride, padding, dilation, batch * groups * parts),
    )
    y = y.view(batch, groups, parts, outputs // groups, *y.shape[2:]).sum(2) if parts > 1 else y
    y = y.view(batch, outputs, *y.shape[-2:])
    return y if biases is None or parts == 1 else y + biases[..., None, None]

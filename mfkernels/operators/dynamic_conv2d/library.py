import torch
from torch import Tensor


def dynamic_conv2d_by_library(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    basis_bias: Tensor | None,
    groups: int,
    basis_scale: float,
) -> Tensor:
    """Compute `mfkernels.ops.dynamic_conv2d` of 1x1 kernels and stride 1 by PyTorch's operators.

    A matrix product mixes the kernels, another one of all samples applies them.
    """
    batch, _, height, width = x.shape
    outputs, inputs = weight.shape[:2]
    mixed = torch.addmm(weight.flatten(), attention, basis.flatten(1), alpha=basis_scale)
    matrices = mixed.view(batch * groups, outputs // groups, inputs)
    y = (matrices @ x.reshape(batch * groups, inputs, height * width)).view(batch, outputs, height, width)
    if basis_bias is not None:
        biases = attention @ basis_bias if bias is None else torch.addmm(bias, attention, basis_bias)
    elif bias is not None:
        biases = bias.expand(batch, -1)
    else:
        return y
    return y + biases[..., None, None]

from torch import Tensor

from ..batch_norm.reference import batch_norm_reference


def pointwise_conv_bn_reference(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.pointwise_conv_bn`; same arguments."""
    y = (weight.flatten(1) @ x.flatten(2)).view(x.shape[0], weight.shape[0], *x.shape[2:])
    return batch_norm_reference(y, gamma, beta, mean, variance, eps, activation)[0]

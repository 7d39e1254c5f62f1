import torch
from torch import Tensor
from torch.nn import functional as F


def token_hyper_reference(
    token: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    other_weight1: Tensor | None = None,
    other_bias1: Tensor | None = None,
    other_weight2: Tensor | None = None,
    other_bias2: Tensor | None = None,
    num_functions: int = 2,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain-PyTorch definition of `mfkernels.ops.token_hyper`; same arguments."""
    hidden = F.relu(F.linear(token, weight1, bias1))
    # A hardsigmoid; PyTorch's own has a sixth of float32 in its gradient, in float64, too.
    theta = F.relu6(F.linear(hidden, weight2, bias2) + 3) / 6
    slopes = 2 * theta.reshape(token.shape[0], num_functions, theta.shape[1] // num_functions)
    if num_functions == 2:
        first, second = slopes.split(1, dim=1)
        slopes = torch.cat([first, second - 1], dim=1)
    if other_weight1 is None or other_bias1 is None or other_weight2 is None or other_bias2 is None:
        return slopes
    other = token_hyper_reference(
        token, other_weight1, other_bias1, other_weight2, other_bias2, num_functions=num_functions
    )
    assert isinstance(other, Tensor)
    return slopes, other

import torch
from torch import Tensor


def dynamic_relu_reference(
    x: Tensor, slopes: Tensor, intercepts: Tensor | None = None, attention: Tensor | None = None
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.dynamic_relu`; same arguments.

    `amax` splits the gradient evenly among the functions that attain the maximum.
    """
    slopes = _to_map(slopes, attention)  # (B, K, C, H, W), or with 1 in place of H and W
    values = slopes * x.unsqueeze(1)
    if intercepts is not None:
        values = values + _to_map(intercepts, attention)
    return values.amax(dim=1)


def _to_map(coefficients: Tensor, attention: Tensor | None) -> Tensor:
    if attention is None:
        return coefficients[..., None, None]
    return torch.einsum("bmhw,bmkc->bkchw", attention, coefficients)

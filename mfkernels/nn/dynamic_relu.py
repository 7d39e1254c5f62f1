import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops


class DynamicReLU(nn.Module):
    """The activation of a Mobile-Former block, with coefficients from a `HyperNetwork`.

    Args:
        num_functions: 2: max(a1 x, a2 x), a1 = 2 theta[:C] in [0, 2] and a2 = 2 theta[C:] - 1 in [-1, 1];
            1: squeeze-and-excitation, 2 theta x; 0: relu6; -1: identity.
        relu6_first: with one function, 2 theta relu6(x): what the released networks do after hidden
            convolutions.

    Inputs:
        x: (B, C, H, W).
        theta: in [0, 1]; for m functions (B, m C), or (B, m C, 1, 1) or (B, m C, H, W). None for m < 1.
        attention: None, or (B, T, H, W) with theta (B, T, m C): theta is then mixed per position. The
            weights need not sum to one. The mixed theta is not stored.

    Returns:
        (B, C, H, W). Where both functions of two are equal, the gradient is split in halves.

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2 and equation 3; Chen et al., Dynamic ReLU,
    ECCV 2020. No intercepts, and no upper bound for two functions, as in the released code.
    """

    def __init__(self, num_functions: int = 2, *, relu6_first: bool = True) -> None:
        super().__init__()
        if num_functions not in (-1, 0, 1, 2):
            raise ValueError(f"DynamicReLU: num_functions must be -1, 0, 1 or 2, got {num_functions}")
        self.num_functions, self.relu6_first = num_functions, relu6_first

    def forward(self, x: Tensor, theta: Tensor | None = None, attention: Tensor | None = None) -> Tensor:
        functions = self.num_functions
        if functions == -1:
            return x
        if functions == 0 or (functions == 1 and self.relu6_first):
            x = F.relu6(x)
        if functions == 0:
            return x
        theta = self._checked(x, theta, attention)
        if attention is not None:
            theta, attention = self._with_constant(theta, attention)
            return ops.dynamic_relu(x, theta, attention=attention)
        if theta.dim() == 4 and theta.shape[2:] != (1, 1):
            a = 2 * theta.unflatten(1, (functions, -1))
            return x * a[:, 0] if functions == 1 else torch.maximum(x * a[:, 0], x * (a[:, 1] - 1))
        slopes = 2 * theta.flatten(1).unflatten(1, (functions, -1))
        if functions == 2:
            slopes = slopes - _offset(slopes)
        return ops.dynamic_relu(x, slopes)

    def _checked(self, x: Tensor, theta: Tensor | None, attention: Tensor | None) -> Tensor:
        if theta is None:
            raise TypeError(f"DynamicReLU: theta must be given for {self.num_functions} functions")
        outputs = self.num_functions * x.shape[1]
        axis = 1 if attention is None else 2
        dims = (2, 4) if attention is None else (3,)
        if theta.dim() not in dims or theta.shape[axis] != outputs or theta.shape[0] != x.shape[0]:
            expected = f"({x.shape[0]}, {outputs}) or ({x.shape[0]}, {outputs}, H, W)"
            if attention is not None:
                expected = f"({x.shape[0]}, T, {outputs})"
            raise ValueError(f"DynamicReLU: theta must have shape {expected}, got {tuple(theta.shape)}")
        return theta

    def _with_constant(self, theta: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes (B, T, m, C) for the mix, in which a2 = 2 sum(attention theta) - 1.

        The -1 is not weighted by the attention, so it comes as a token of its own with weight one.
        """
        slopes = 2 * theta.unflatten(2, (self.num_functions, -1))
        if self.num_functions == 1:
            return slopes, attention
        constant = -_offset(slopes).to(slopes).expand(slopes.shape[0], 1, -1, slopes.shape[3])
        return torch.cat([slopes, constant], 1), F.pad(attention, (0, 0, 0, 0, 0, 1), value=1.0)

    def extra_repr(self) -> str:
        return f"num_functions={self.num_functions}, relu6_first={self.relu6_first}"


def _offset(slopes: Tensor) -> Tensor:
    """0 for the first function and 1 for the second, to broadcast against (..., 2, C)."""
    return torch.arange(2, dtype=slopes.dtype, device=slopes.device)[:, None]

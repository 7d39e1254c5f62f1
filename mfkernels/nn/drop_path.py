import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes slices along dimension 0 and scales the others up.

    Args:
        rate: probability that a slice is dropped, in [0, 1).

    For a feature map dimension 0 is the batch. For Mobile-Former's tokens, (T, B, d), it is the token:
    the released networks drop whole tokens, for all samples at once.

    Raises:
        ValueError: `rate` outside of [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath: rate must be in [0, 1), got {rate}")
        self.rate = rate

    def scale(self, x: Tensor) -> Tensor | None:
        """Return the factors, (len(x), 1, ...), or None where nothing is dropped."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        ones = torch.full((x.shape[0],) + (1,) * (x.dim() - 1), keep, dtype=x.dtype, device=x.device)
        return torch.bernoulli(ones) / keep

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def growing_rates(rate: float, count: int) -> list[float]:
    """Rates of `count` blocks, from 0 linearly to `rate`.

    Not by `torch.linspace`: networks are also made on the meta device.
    """
    return [rate * i / max(count - 1, 1) for i in range(count)]

"""What `deploy` returns."""

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_tensor


class Deployed(nn.Module):
    """A network prepared for inference on a CPU.

    Args:
        operator: that runs it, of `torch.ops.mfkernels`.
        weights, plan: what the operator wants.
        dtype: of the network.
        in_channels, classes: of its images and its results.
        parts: names of what `times` measures.
    """

    weights: Tensor
    plan: Tensor

    def __init__(
        self,
        operator: str,
        weights: Tensor,
        plan: list[int],
        *,
        dtype: torch.dtype,
        in_channels: int,
        classes: int,
        parts: list[str],
    ) -> None:
        super().__init__()
        self.dtype, self.in_channels, self.classes = dtype, in_channels, classes
        self._operator, self._parts = operator, parts
        self.register_buffer("weights", weights)
        self.register_buffer("plan", torch.tensor(plan, dtype=torch.int64))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images on the CPU to (B, classes), in the dtype of the images: float32, or that of the
        network.

        Raises:
            TypeError, ValueError: an input that does not fit, named.
        """
        self._check(x)
        run: Any = getattr(torch.ops.mfkernels, self._operator)
        return run(x.float(), self.weights, self.plan, self.classes).to(x.dtype)

    def times(self, x: Tensor) -> dict[str, float]:
        """Seconds that each part takes for one image, (1, C, H, W): the parts of the network by name, those
        of the tokens with " tokens" behind it."""
        self._check(x)
        run: Any = getattr(torch.ops.mfkernels, f"{self._operator}_times")
        times = dict.fromkeys(self._parts, 0.0)
        seconds = run(x.float(), self.weights, self.plan, self.classes).tolist()
        for part, value in zip(self._parts, seconds, strict=True):
            times[part] += value
        return times

    def _check(self, x: Tensor) -> None:
        check_tensor("deploy", "x", x, "B C H W")
        if x.dtype not in (torch.float32, self.dtype) or x.device.type not in ("cpu", "meta"):
            allowed = " or ".join(str(dtype)[6:] for dtype in dict.fromkeys((torch.float32, self.dtype)))
            raise TypeError(f"deploy: x must be a {allowed} tensor on the CPU, got {x.dtype} on {x.device}")
        if x.shape[1] != self.in_channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(
                f"deploy: x must have shape (B, {self.in_channels}, H, W), H and W at least 1, "
                f"got {tuple(x.shape)}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("deploy: x must not require gradients: a deployed network has none")

    def extra_repr(self) -> str:
        return f"classes={self.classes}, weights={self.weights.numel() * 4 / 1e6:.1f} MB"


def _fake(x: Tensor, weights: Tensor, plan: Tensor, classes: int) -> Tensor:
    return x.new_empty((x.shape[0], classes))


torch.library.register_fake("mfkernels::deployed_mobile_former", _fake)
torch.library.register_fake("mfkernels::deployed_chain", _fake)

"""The one tolerance of this project."""

import torch
from torch import Tensor


def largest_error(value: Tensor, truth: Tensor, rest: Tensor | None = None) -> float:
    """max |value - truth|; infinite where exactly one of them is not finite, or their infinities differ.

    Where float64 cannot hold the truth, it is truth + rest.
    """
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    if value.numel() == 0:
        return 0.0
    value = value.to(truth.dtype)
    error = value - truth if rest is None else value - truth - rest
    same = (value.isinf() & (value == truth)) | (value.isnan() & truth.isnan())
    error = torch.where(same, 0.0, error.abs())
    return error.nan_to_num(nan=float("inf")).max().item()


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What two roundings to `dtype` do to `truth`."""
    return largest_error((truth.to(dtype) + 0.3 - 0.3).to(truth.dtype), truth)


def tolerance(truth: Tensor, reference_error: float, dtype: torch.dtype) -> float:
    """Twice the error of the reference in the kernel's own dtype, and twice that of the dtype itself."""
    return 2 * reference_error + 2 * rounding(truth, dtype)


class Errors:
    """The one tolerance for several tensors together, each error in units of its tensor's own rounding.

    A tensor of a few numbers can have a reference that happens to be exact. Several of them cannot.
    """

    def __init__(self) -> None:
        self._reference, self._kernel = 0.0, 0.0

    def reference(self, value: Tensor, truth: Tensor, rest: Tensor | None = None) -> None:
        self._reference = max(self._reference, _in_roundings(value, truth, rest))

    def kernel(self, value: Tensor, truth: Tensor, rest: Tensor | None = None) -> None:
        self._kernel = max(self._kernel, _in_roundings(value, truth, rest))

    def hold(self) -> bool:
        return self._kernel <= 2 * self._reference + 2

    def check(self, what: str) -> None:
        assert self.hold(), (
            f"{what}: error {self._kernel:.3g} roundings, of the reference {self._reference:.3g}"
        )


def _in_roundings(value: Tensor, truth: Tensor, rest: Tensor | None) -> float:
    largest = truth.abs().max().item() if truth.numel() else 0.0
    floor = torch.finfo(value.dtype).eps / 8 * max(0.3, largest)
    return largest_error(value, truth, rest) / max(rounding(truth, value.dtype), floor)

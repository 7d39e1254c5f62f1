"""The one tolerance of this project."""

from statistics import mean

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


class MeanErrors:
    """The one tolerance for several images of a whole network, for the mean of their errors.

    In a deep network a rounding comes back a hundred times over, so that the largest error of a few images is
    luck: of 80 images through mobile_former_26m the reference's errors have a mean of 70 roundings and a
    largest one of 123, and 279 in the other memory format.
    """

    def __init__(self) -> None:
        self._reference: list[float] = []
        self._kernel: list[float] = []

    def reference(self, value: Tensor, truth: Tensor) -> None:
        self._reference.append(_in_roundings(value, truth, None))

    def kernel(self, value: Tensor, truth: Tensor) -> None:
        self._kernel.append(_in_roundings(value, truth, None))

    def check(self, what: str) -> None:
        kernel, reference = mean(self._kernel), mean(self._reference)
        assert kernel <= 2 * reference + 2, (
            f"{what}: mean error {kernel:.3g} roundings, of the reference {reference:.3g}"
        )


def _in_roundings(value: Tensor, truth: Tensor, rest: Tensor | None) -> float:
    largest = truth.abs().max().item() if truth.numel() else 0.0
    floor = torch.finfo(value.dtype).eps / 8 * max(0.3, largest)
    return largest_error(value, truth, rest) / max(rounding(truth, value.dtype), floor)

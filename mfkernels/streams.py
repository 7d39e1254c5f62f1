"""Run work side by side on a GPU's streams; no other module knows of them.

Modules say which of their work does not depend on which other.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import tensors_in

Side = TypeVar("Side")
Main = TypeVar("Main")

_enabled = True


@contextmanager
def use_streams(on: bool) -> Iterator[None]:
    """Choose, in the `with` block, whether blocks run their Former beside their Mobile on CUDA devices.

    They do so at first. On CPUs, and where `torch.compile` traces, they run one after the other.

    Args:
        on: for the whole process.

    Raises:
        TypeError: `on` is no bool.
    """
    global _enabled
    if not isinstance(on, bool):
        raise TypeError(f"use_streams: on must be a bool, got {type(on).__name__}")
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def side_by_side(side: Callable[[], Side], main: Callable[[], Main], *read: Tensor) -> tuple[Side, Main]:
    """`side()` on a stream of its own beside `main()` on the current one; work after it finds both done.

    Autograd runs the backward pass of each on the stream that its forward pass was on.

    Args:
        side: returns a tensor, or tuples or lists of tensors and None.
        main: anything.
        read: the tensors that `side` reads, other than parameters.

    Returns:
        Both results.
    """
    if not _enabled or torch.compiler.is_compiling() or not _gpu.has(read[0]):
        return side(), main()
    current, other = _gpu.streams(read[0])
    other.wait_stream(current)
    with _gpu.on(other):
        result = side()
    beside = main()
    current.wait_stream(other)
    # Memory belongs to the stream on which it was asked for. What the other one uses, too, must not be given
    # out again on the first alone: in the backward pass nothing else would keep them in step.
    for tensor in read:
        _gpu.record(tensor, other)
    for tensor in tensors_in(result):
        _gpu.record(tensor, current)
    return result, beside


class _Cuda:
    """PyTorch's streams; tests have a double of it."""

    def __init__(self) -> None:
        self._sides: dict[tuple[Any, int], torch.cuda.Stream] = {}

    def has(self, x: Tensor) -> bool:
        return x.is_cuda

    def streams(self, x: Tensor) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """Return the current stream, and one beside it.

        Each stream has one of its own beside it, so that two networks on two streams do not wait for one
        another.
        """
        current = torch.cuda.current_stream(x.device)
        key = x.device, current.cuda_stream
        if key not in self._sides:
            self._sides[key] = torch.cuda.Stream(x.device)
        return current, self._sides[key]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def record(self, x: Tensor, stream: torch.cuda.Stream) -> None:
        x.record_stream(stream)


_gpu: Any = _Cuda()

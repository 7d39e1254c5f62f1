"""Calls on some number of threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_threads(call: Callable[[], Any]) -> list[Any]:
    """Its results on one, two, three and eight threads."""
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(call())
    return results

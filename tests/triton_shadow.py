"""Finds races in Triton's interpreter, where programs run one after the other and so give right numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter

Pairs = list[np.ndarray]  # each (2, n): addresses, and the number of the program that uses them


class Race(AssertionError):
    """Two programs of a launch use the same number, and one of them writes it."""


def _program() -> int:
    (x, y, z), (width, height, _) = (
        interpreter.interpreter_builder.grid_idx,
        interpreter.interpreter_builder.grid_dim,
    )
    return x + width * (y + height * z)


def _note(pairs: Pairs, pointers: np.ndarray, mask: np.ndarray) -> None:
    addresses, used = np.broadcast_arrays(pointers, mask)
    addresses = addresses[used.astype(bool)].astype(np.uint64)
    pairs.append(np.stack([addresses, np.full(addresses.size, _program(), np.uint64)]))


def _check(kernel: str, read: Pairs, written: Pairs) -> None:
    if not written:
        return
    addresses, writers = np.unique(np.concatenate(written, axis=1), axis=1)
    if (addresses[1:] == addresses[:-1]).any():
        raise Race(f"{kernel}: two programs write the same number")
    wanted, readers = np.unique(np.concatenate(read, axis=1), axis=1) if read else np.empty((2, 0))
    place = np.minimum(np.searchsorted(addresses, wanted), addresses.size - 1)
    if ((addresses[place] == wanted) & (writers[place] != readers)).any():
        raise Race(f"{kernel}: a program reads what another one writes")


@contextmanager
def shadowed() -> Iterator[None]:
    """Raise `Race` after a launch in which two programs use a number that one of them writes.

    Atomic operations are refused: no kernel has any.
    """
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    read: Pairs = []
    written: Pairs = []

    def loading(pointers: Any, mask: Any, *others: Any) -> Any:
        _note(read, pointers.data, mask.data)
        return load(pointers, mask, *others)

    def storing(pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        _note(written, pointers.data, mask.data)
        return store(pointers, value, mask, *others)

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        read.clear()
        written.clear()
        launch(self, *args, **kwargs)
        _check(self.fn.__name__, read, written)

    def refused(*args: Any) -> None:
        raise Race("an atomic operation, of which the shadow knows nothing")

    replacements: dict[str, Callable[..., Any]] = dict(
        create_masked_load=loading,
        create_masked_store=storing,
        create_atomic_rmw=refused,
        create_atomic_cas=refused,
    )
    with mock.patch.multiple(builder, **replacements), mock.patch.object(executor, "__call__", launched):
        yield

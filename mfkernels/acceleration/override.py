"""Put a forward of ours in the place of another class's, and change nothing else."""

import copy
import functools
import types
from typing import Any

from torch import nn

from ..nn.replacement import ORIGINAL


class Override(nn.Module):
    """A base of classes that have a `forward` alone, for `override`."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep what is set from outside, a temperature say, so that it is there after `restore`, too."""
        super().__setattr__(name, value)
        if name in self.__dict__ and ORIGINAL in self.__dict__:
            self.__dict__[ORIGINAL].__dict__[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the bases to pickle, which does not find a class that `override` made by its name."""
        made = super().__reduce_ex__(protocol)
        return _blank, type(self).__bases__, *made[2:]


def override(forward: type[Override], old: nn.Module) -> nn.Module:
    """Return `old` with the forward of another class, as a module of its own.

    Args:
        forward: a class with that forward, which finds in `self` all that `old` has.
        old: left as it is.

    Returns:
        An instance of `forward` and of the class of `old`, so that its methods are there and code that looks
        for that class finds it. Parameters, buffers, submodules and hooks are the same objects.
    """
    new = _blank(forward, type(old))
    new.__dict__.update(old.__dict__)
    for own in ("_parameters", "_buffers", "_modules"):
        new.__dict__[own] = copy.copy(old.__dict__[own])
    return new


def _blank(forward: type[Override], theirs: type[nn.Module]) -> nn.Module:
    cls = _both(forward, theirs)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _both(forward: type[Override], theirs: type[nn.Module]) -> type[nn.Module]:
    both = types.new_class(forward.__name__, (forward, theirs))
    both.__module__ = forward.__module__
    return both

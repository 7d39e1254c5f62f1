"""Stand in the place of somebody else's module, and look after the original."""

import functools
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .inputs import has_hooks

ORIGINAL = "_mfkernels_original"  # under which a module holds the one in whose place it stands
_WATCHED = "_mfkernels_watched"
_WARNED = "_mfkernels_warned"


class _Watched:
    """Parts, and what is cheap to know of them: how many attributes, which settings, whether any hooks."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self.readers = [(part, itemgetter(*names)) for part in parts if (names := _settings(part))]
        self.facts = self._read()
        self.handles = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": -1}  # of this process

    def _read(self) -> tuple[list[int], list[Any]]:
        sizes = [len(part.__dict__) for part in self.parts]
        return sizes, [read(part.__dict__) for part, read in self.readers]

    def is_changed(self) -> bool:
        if self._read() != self.facts:
            return True
        made = RemovableHandle.next_id  # no part has new hooks where nobody has registered any
        if made != self.handles:
            if any(map(has_hooks, self.parts)):
                return True
            self.handles = made
        return False


def _settings(part: nn.Module) -> list[str]:
    """Return the names of the module's attributes that are numbers, flags or words."""
    plain = (bool, int, float, str, type(None))
    return [
        k for k, v in vars(part).items() if type(v) in plain and k != "training" and not k.startswith("_")
    ]


class Replacement(nn.Module):
    """A module that may stand in the place of another one, some of whose parts it does not call.

    Somebody who holds such a part may change it: register a hook, patch its `forward` or `train`, set a rate.
    Each call looks for that. If it finds a change, the original runs, and `warnings.warn` says so once.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _looked_after(cls.forward)  # type: ignore[method-assign]

    def watch(self, original: nn.Module) -> None:
        """From now on, look at those parts of `original` that have no place here."""
        kept = set(self.modules())
        self.__dict__[_WATCHED] = _Watched([part for part in original.modules() if part not in kept])

    @torch.compiler.assume_constant_result
    def _is_overruled(self) -> bool:
        return self.__dict__[_WATCHED].is_changed()

    def _run_original(self, *args: Any, **kwargs: Any) -> Any:
        original = self.__dict__[ORIGINAL]
        if _WARNED not in self.__dict__:
            self.__dict__[_WARNED] = True
            warnings.warn(
                f"a part of a {type(original).__name__} was changed after `accelerate`, which the "
                f"{type(self).__name__} in its place does not call: the original runs instead",
                stacklevel=2,
            )
        give_back(self, original)
        return original(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        if _WATCHED not in self.__dict__ or not self._is_overruled():
            return super().train(mode)
        self.__dict__[ORIGINAL].train(mode)  # which may have a `train` of its own
        follow_modes(self, self.__dict__[ORIGINAL])
        return self


def _looked_after(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: Replacement, *args: Any, **kwargs: Any) -> Any:
        if _WATCHED in self.__dict__ and self._is_overruled():
            return self._run_original(*args, **kwargs)
        return forward(self, *args, **kwargs)

    return run


def give_back(new: nn.Module, old: nn.Module) -> None:
    """Give `old` what `new` has now: parameters, buffers, layers and modes."""
    _give_state(new, old)
    follow_modes(old, new)


def _give_state(new: nn.Module, old: nn.Module) -> None:
    for own, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        own.update({name: theirs[name] for name in own})  # type: ignore[misc]
    for name, child in list(old._modules.items()):
        now = new._modules.get(name)
        if child is None or now is None or now is child:
            continue
        if not is_layer(child):
            _give_state(now, child)
        elif has_state(child):
            old._modules[name] = now


def follow_modes(module: nn.Module, leader: nn.Module) -> None:
    """Put the parts that only `module` has in the mode of those in their place in `leader`."""
    places = dict(leader.named_modules())
    shared = set(places.values())
    for path, part in module.named_modules():
        if part not in shared:
            part.training = places.get(path, leader).training


def is_layer(module: nn.Module) -> bool:
    """One of PyTorch's, which is taken as it is."""
    return not module._modules and type(module).__module__.startswith("torch.nn.")


def has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())

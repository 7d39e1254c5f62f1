"""How a module of ours takes the place of another one: with the very layers and parameters of that one."""

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.inputs import has_hooks

# What convolutions and norms may differ in beside their weights.
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "eps", "num_groups")


class Unfit(Exception):
    """A module looks like one that can be replaced, and is not; the message says why."""


def adopt(new: nn.Module, old: nn.Module, *, whole: Sequence[str] = ()) -> nn.Module:
    """Give `new` the layers, parameters and buffers of `old`: the same objects under the same names.

    Args:
        new: a module with the state of `old`; its own layers with parameters are thrown away.
        old: left as it is.
        whole: paths of submodules that are taken as they are, with all that they contain.

    Returns:
        `new`.

    Raises:
        Unfit: a layer is missing or of another kind, a shape differs, or `old` has more state than `new`.
    """
    _take(new, old, "", whole)
    for kind in ("parameters", "buffers"):
        ours, theirs = (dict(getattr(m, f"named_{kind}")(remove_duplicate=False)) for m in (new, old))
        if list(ours) != list(theirs):
            different = sorted(set(ours) ^ set(theirs))
            raise Unfit(f"other {kind}: {', '.join(different) if different else 'in another order'}")
        if any(ours[name] is not theirs[name] for name in ours):
            raise Unfit(f"{kind} are shared in another way")
    places = dict(old.named_modules())
    mine = set(places.values())
    for path, module in new.named_modules():
        if module not in mine:
            module.training = places.get(path, old).training
    return new


def give_back(new: nn.Module, old: nn.Module) -> None:
    """Give `old` what `new` has now in the place of what `adopt` took."""
    for own, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        own.update({name: theirs[name] for name in own})  # type: ignore[misc]
    for name, child in list(old._modules.items()):
        now = new._modules.get(name)
        if child is None or now is None or now is child:
            continue
        if not _is_layer(child):
            give_back(now, child)
        elif _has_state(child):
            old._modules[name] = now
    shared = set(new.modules())
    for module in old.modules():
        if module not in shared:
            module.training = new.training


def _take(new: nn.Module, old: nn.Module, path: str, whole: Sequence[str]) -> None:
    for own, theirs in ((new._parameters, old._parameters), (new._buffers, old._buffers)):
        for name, value in list(own.items()):
            other = theirs.get(name)
            if value is None and other is None:
                continue
            if value is None or other is None or value.shape != other.shape:
                raise Unfit(f"{path}{name} has the shape {_shape(other)}, expected {_shape(value)}")
            own[name] = other  # type: ignore[index, assignment]
    for name, child in list(new.named_children()):
        if not _has_state(child):
            continue
        layer = old._modules.get(name)
        if layer is None:
            raise Unfit(f"it has no {path}{name}")
        if path + name in whole:
            new._modules[name] = layer
        elif _is_layer(child):
            _check_layer(child, layer, path + name)
            new._modules[name] = layer
        else:
            _take(child, layer, f"{path}{name}.", whole)


def _check_layer(expected: nn.Module, layer: nn.Module, path: str) -> None:
    same = type(layer).forward is type(expected).forward
    if not same and not (isinstance(layer, _BatchNorm) and isinstance(expected, _BatchNorm)):
        raise Unfit(f"{path} is a {type(layer).__name__}, expected {type(expected).__name__}")
    for setting in _SETTINGS:
        ours, theirs = (str(getattr(m, setting, None)) for m in (expected, layer))
        if ours != theirs:
            raise Unfit(f"{path} has {setting} {theirs}, expected {ours}")
    for name, value in expected.named_parameters():
        other = layer._parameters.get(name)
        if other is None or other.shape != value.shape:
            raise Unfit(f"{path}.{name} has the shape {_shape(other)}, expected {_shape(value)}")


def hooked(old: nn.Module, new: nn.Module) -> Iterator[str]:
    """The modules of `old` that have hooks and have no part in `new`."""
    kept = set(new.modules())
    for path, module in old.named_modules():
        if module not in kept and has_hooks(module):
            yield path or "itself"


def _is_layer(module: nn.Module) -> bool:
    """One of PyTorch's, which is taken as it is."""
    return not module._modules and type(module).__module__.startswith("torch.nn.")


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _shape(value) -> object:  # type: ignore[no-untyped-def]
    return None if value is None else tuple(value.shape)

"""Put a module of ours in the place of another one, with the very layers and parameters of that one."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.inputs import has_hooks
from ..nn.replacement import follow_modes, has_state, is_layer

# What convolutions and norms may differ in beside their weights.
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "eps", "num_groups")

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_METHODS = ("__call__", "train", "eval", "_apply", "_save_to_state_dict", "_load_from_state_dict")


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
    follow_modes(new, old)
    return new


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
        if not has_state(child):
            continue
        layer = old._modules.get(name)
        if layer is None:
            raise Unfit(f"it has no {path}{name}")
        if path + name in whole:
            new._modules[name] = layer
        elif is_layer(child):
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


def check_unchanged(old: nn.Module, new: nn.Module) -> None:
    """Raise Unfit where `old` has what `new` would not do.

    This is a hook or a method of its own in a part that has no place in `new`, or a `forward` patched on any
    part, which says nothing of what it computes elsewhere.
    """
    kept = set(new.modules())
    for path, module in old.named_modules():
        name, facts = path or "itself", vars(module)
        if "forward" in facts:
            raise Unfit(f"{name} has a forward of its own")
        if module in kept:
            continue
        if has_hooks(module) or any(facts.get(hooks) for hooks in _STATE_HOOKS):
            raise Unfit(f"{name} has hooks, which would not be called")
        for method in _METHODS:
            if method in facts or getattr(type(module), method) is not getattr(nn.Module, method):
                raise Unfit(f"{name} has a {method} of its own")


def _shape(value) -> object:  # type: ignore[no-untyped-def]
    return None if value is None else tuple(value.shape)

"""`accelerate` and `restore`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.replacement import ORIGINAL, Replacement, give_back
from . import (
    dymn,
    dynamic_conv,
    dynamic_mobile_former,
    dynamic_relu,
    iformer,
    iformer_timm,
    mobile_former,
    response_norm,
    sequential,
)
from .adopt import Unfit, check_unchanged
from .settings import Found, random_inputs
from .trial import compare, compare_networks

# What takes the place of a module, or None if the rule does not concern it; raises Unfit with a reason if it
# looks like one that the rule is for, and is not.
Rule = Callable[[nn.Module], nn.Module | None]
_KNOWN: tuple[Callable[[nn.Module], Found], ...] = (
    *mobile_former.RULES,
    *dynamic_mobile_former.RULES,
    *iformer_timm.RULES,
    *iformer.RULES,
    *response_norm.RULES,
    *dynamic_relu.RULES,
    *dynamic_conv.RULES,
    *dymn.RULES,
    *sequential.RULES,
)


@dataclass(frozen=True)
class Replaced:
    """A module at `path`, and the classes that it was and is of."""

    path: str
    was: str
    now: str


@dataclass(frozen=True)
class Left:
    """A module at `path` that looked like one that can be replaced, its class, and why it was left alone."""

    path: str
    kind: str
    why: str


@dataclass
class Report:
    """Say what `accelerate` did. As a string, this is a table."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        lines += [f"  {r.path}: {r.was} -> {r.now}" for r in self.replaced]
        lines += [f"  {r.path}: {r.kind} left alone: {r.why}" for r in self.left]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, rules: Sequence[Rule] = ()) -> Report:
    """Replace the parts of a network that mfkernels can run faster, in place, for training and for inference.

    Known are the classes of the released Mobile-Former, DMF and iFormer, and of timm's iFormer, by their
    names, attributes and shapes; they are not imported. Known by their names, too, are `GlobalResponseNorm`
    and `CondConv2d` of timm, `ConvNextV2GRN` of transformers, `DyReLUA` and `DyReLUB` of Islanna's
    DynamicReLU, `DyReLU` of mmdetection, `Dynamic_conv2d` of Dynamic-convolution-Pytorch, and `DY_Block`,
    `ContextGen`, `CoordAtt`, `DynamicConv` and `DyReLUB` of EfficientAT, which get another `forward` and
    remain of their classes. Known is also PyTorch's own `nn.Sequential`, in any network, where batch norms
    are in it. Each replacement is tried before it is made, with random weights against the original, in
    inference and in training: what does not give the same numbers is left alone, and what has hooks or a
    `forward` or `train` of its own that would not be called. Where such come later, calls find it: the
    original runs, with a warning. Layers, parameters and buffers stay the same objects under the same names,
    so optimizers, wrappers and checkpoints go on working. After an exception nothing is replaced.

    Args:
        model: any network. A second call changes nothing. In networks of `mfkernels.models` there is nothing
            to replace.
        rules: functions of your own, asked first. One gets a module and returns what takes its place, or None
            if it does not concern it; see `mfkernels.acceleration.adopt` for how to keep parameters. These
            replacements are checked for their parameters, not for their numbers.

    Returns:
        What was replaced by what, and what was left alone and why; `print` shows it as a table.

    Raises:
        TypeError: `model` is no module.
        ValueError: a rule of yours returned a module with other parameters than those of the original.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    report = Report()
    undo: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    try:
        with torch.random.fork_rng(devices=[]):  # modules are made with random weights, and these thrown away
            _visit(model, "", rules, report, {}, undo)
    except BaseException:
        for modules, name, child in reversed(undo):
            modules[name] = child
        raise
    return report


def as_ours(model: nn.Module) -> nn.Module | None:
    """Return a released network or one of timm as the same network of `mfkernels.models`.

    It may be accelerated or not, and its weights are copied. The result is None where it is no such network.
    Raises Unfit if it only looks like one.
    """
    plain = copy.deepcopy(model)
    restore(plain)
    for family in (mobile_former, dynamic_mobile_former, iformer, iformer_timm):
        with _recognising():
            new: Any = family.network(plain)
        if new is not None:
            compare_networks(plain, family.network, random_inputs((2, new.in_channels, 64, 64)))
            return new
    return None


def restore(model: nn.Module) -> Report:
    """Undo `accelerate`: put the original modules back, with the parameters and buffers of now.

    Returns:
        What was replaced by what.
    """
    report = Report()
    for parent, name, path in list(_children(model)):
        new = parent._modules[name]
        old = None if new is None else new.__dict__.get(ORIGINAL)
        if new is None or old is None:
            continue
        give_back(new, old)
        parent._modules[name] = old
        report.replaced.append(Replaced(path, type(new).__name__, type(old).__name__))
    return report


def _children(model: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Every place of a module: its parent, its name there, its path."""
    for name, child in list(model._modules.items()):
        if child is not None:
            path = f"{prefix}{name}"
            yield model, name, path
            yield from _children(child, f"{path}.")


def _visit(
    module: nn.Module,
    prefix: str,
    rules: Sequence[Rule],
    report: Report,
    done: dict[nn.Module, nn.Module],
    undo: list[tuple[dict[str, nn.Module | None], str, nn.Module]],
) -> None:
    for name, child in list(module._modules.items()):
        if child is None or ORIGINAL in child.__dict__:
            continue
        path = f"{prefix}{name}"
        new = done.get(child)  # a module that is used in several places
        if new is None:
            try:
                new = _replacement(child, rules)
            except Unfit as reason:
                report.left.append(Left(path, type(child).__name__, str(reason)))
        if new is None:
            _visit(child, f"{path}.", rules, report, done, undo)
            continue
        done[child] = new
        if isinstance(new, Replacement):
            new.watch(child)
        new.__dict__[ORIGINAL] = child  # not as a submodule: it must not appear in the state
        undo.append((module._modules, name, child))
        module._modules[name] = new
        report.replaced.append(Replaced(path, type(child).__name__, type(new).__name__))
        _visit(new, f"{path}.", rules, report, done, undo)  # what it took over as it was


def _replacement(old: nn.Module, rules: Sequence[Rule]) -> nn.Module | None:
    for rule in rules:
        new = rule(old)
        if new is not None:
            _check_parameters(rule, old, new)
            return new
    if type(old).__module__.startswith(f"{__package__.split('.')[0]}."):
        return None  # one of ours
    for known in _KNOWN:
        with _recognising():
            found = known(old)
        if found is None:
            continue
        new, inputs = found
        check_unchanged(old, new)
        compare(old, new, inputs())
        return new
    return None


@contextmanager
def _recognising() -> Iterator[None]:
    """Report what a rule does not find, or cannot build from, as a module of another structure."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Unfit(f"its structure is not that of the released class: {error}") from error


def _check_parameters(rule: Rule, old: nn.Module, new: nn.Module) -> None:
    theirs, ours = dict(old.named_parameters()), dict(new.named_parameters())
    if list(theirs) != list(ours) or any(theirs[name] is not ours[name] for name in theirs):
        raise ValueError(
            f"accelerate: {getattr(rule, '__name__', 'a rule')} returned a {type(new).__name__} whose "
            f"parameters are not those of the {type(old).__name__}: the same objects, names and order; "
            "see mfkernels.acceleration.adopt"
        )

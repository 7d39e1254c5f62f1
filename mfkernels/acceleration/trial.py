"""The trial of a replacement: it and the original with the same random weights."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ..checks import tensors_in
from .adopt import Unfit


def compare(old: nn.Module, new: nn.Module, inputs: tuple) -> None:
    """Raise Unfit unless both modules give the same.

    In eval mode results are compared; in train mode also the gradients of inputs and parameters, and buffers
    afterwards. All runs in float64, and both draw the same random numbers.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        values = _random_values(old)
        for training in (False, True):
            _check_same([lambda m=m: _copy(m, values) for m in (old, new)], inputs, training)


def compare_networks(old: nn.Module, convert: Callable[[Any], Any], inputs: tuple) -> None:
    """Raise Unfit unless `convert` makes of a network one with the same results in eval mode.

    It is given a copy with random weights: in its result parameters may be others, and in another order.
    """
    with torch.random.fork_rng(devices=[]):
        random = _copy(old, _random_values(old))
        _check_same([lambda: random, lambda: convert(random)], inputs, False)


def _check_same(makers: list[Any], inputs: tuple, training: bool) -> None:
    theirs, ours = (_run(make, inputs, training) for make in makers)
    same = len(theirs) == len(ours) and all(
        _close(one, other, training) for one, other in zip(theirs, ours, strict=True)
    )
    if not same:
        where = " in training" if training else ""
        raise Unfit(f"it computes something else than the released class{where}")


def _close(one: Tensor | None, other: Tensor | None, training: bool) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape:
        return False
    size = float(one.abs().max()) if one.numel() else 0.0
    if not training:
        return torch.allclose(one, other, rtol=1e-8, atol=1e-8 * size)
    # PyTorch's hardsigmoid, which our gates take, has a gradient rounded to float32 in float64, too.
    return torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-6 * max(size, 1.0))


def _run(make: Callable[[], nn.Module], inputs: tuple, training: bool) -> list[Tensor | None]:
    """Return results, and in training gradients and buffers, of the module that `make` returns.

    A gradient that does not exist is None.
    """
    try:
        with torch.set_grad_enabled(training), _SameDraws():
            torch.default_generator.manual_seed(0)
            trial = make().train(training)
            given = [t.clone().requires_grad_(training) for t in tensors_in(inputs)]
            results = tensors_in(trial(*_like(inputs, (t.clone() for t in given))))
            if not training:
                return [*results]
            sources = [*given, *trial.parameters()]
            generator = torch.Generator().manual_seed(2)
            total = sum((r * torch.randn(r.shape, generator=generator)).sum() for r in results)
            gradients = torch.autograd.grad(total, sources, allow_unused=True)  # type: ignore[arg-type]
            return [*(r.detach() for r in results), *gradients, *trial.buffers()]
    except Exception as error:
        raise Unfit(f"it does not run as the released class does: {error}") from error


def _like(inputs: Any, tensors: Any) -> Any:
    """Return `inputs` with other tensors in the place of its own."""
    if isinstance(inputs, Tensor):
        return next(tensors)
    return tuple(_like(value, tensors) for value in inputs)


def _random_values(module: nn.Module) -> dict[int, Tensor]:
    """Random parameters and buffers on the CPU, by the identity of what they stand for."""
    generator = torch.Generator().manual_seed(0)
    values: dict[int, Tensor] = {}
    for parameter in module.parameters():
        width = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * width**-0.5
        values[id(parameter)] = nn.Parameter(noise + (parameter.dim() == 1))
    for buffer in module.buffers():
        value = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.detach().cpu()
        values[id(buffer)] = value.double() if buffer.is_floating_point() else value
    for inner in module.modules():
        if isinstance(inner, _BatchNorm) and inner.running_mean is not None and inner.running_var is not None:
            shape = inner.num_features
            values[id(inner.running_mean)] = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            values[id(inner.running_var)] = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return values


def _copy(module: nn.Module, values: dict[int, Tensor]) -> nn.Module:
    """Return a copy with these parameters and copies of these buffers, without hooks.

    Nobody waits for the copy's calls.
    """
    memo: dict[int, Any] = dict(values)
    for buffer in module.buffers():
        memo[id(buffer)] = values[id(buffer)].clone()
    for inner in module.modules():
        for name, hooks in vars(inner).items():
            if "_hooks" in name and isinstance(hooks, dict):
                memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(module, memo)


class _SameDraws(TorchDispatchMode):
    """Make what dropouts draw depend on their shape and rate alone, in whatever order they draw.

    So two modules that drop in the same places drop the same.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("bernoulli", "bernoulli_", "rand", "rand_like", "uniform_"):
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        uniform = torch.rand(result.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if name.startswith("bernoulli"):
            chance = args[1] if len(args) > 1 else args[0]
            return result.copy_(uniform < chance)
        return result.copy_(1 - uniform)  # floor(keep + this) is 1 where uniform < keep

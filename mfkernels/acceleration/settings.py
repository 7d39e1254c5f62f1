"""Define the result of the rules, and read modules whose code is not ours."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# What takes the place of a module, and what makes inputs on which both are compared; None if the rule does
# not concern it.
Found = tuple[nn.Module, Callable[[], tuple]] | None


def drop_path_rate(module: nn.Module) -> float:
    """Of a stochastic depth as timm and its copies have it."""
    if isinstance(module, nn.Identity):
        return 0.0
    return float(module.drop_prob or 0.0)  # type: ignore[arg-type]


def random_inputs(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors in float64, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

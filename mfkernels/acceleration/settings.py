"""What the rules read from modules whose code is not ours."""

import torch
from torch import Tensor, nn


def drop_path_rate(module: nn.Module) -> float:
    """Of a stochastic depth as timm and its copies have it."""
    if isinstance(module, nn.Identity):
        return 0.0
    return float(module.drop_prob or 0.0)  # type: ignore[arg-type]


def random_inputs(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors in float64, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends, ops
from .inputs import untouched


def normalize(norm: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    """Apply a batch norm layer and the activation after it, in one kernel: `gelu(norm(x))`.

    It takes the layer's parameters, and in train mode measures and updates its running statistics, as the
    layer itself does. Layers that are no plain `nn.BatchNorm2d` with an affine part, and such with hooks, are
    called; so are, by default, those that train on a CPU on maps so small that calls take longer than work.

    Args:
        norm: an `nn.BatchNorm2d`, in train or in eval mode, or whatever stands in its place.
        x: (B, C, H, W).
        activation: "none" or "gelu".

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: `activation` is neither, or in train mode a channel of `x` has one number.
    """
    layer: Any = norm
    if activation == "none" and not layer.training:
        return layer(x)  # which PyTorch does as fast as can be
    if not is_plain_norm(layer, x) or _is_small(layer, x, activation):
        if activation not in ("none", "gelu"):
            raise ValueError(f"normalize: activation must be 'none' or 'gelu', got {activation!r}")
        return F.gelu(layer(x)) if activation == "gelu" else layer(x)
    parameters = (layer.weight, layer.bias)
    if not layer.training:
        return ops.batch_norm(
            x, *parameters, layer.running_mean, layer.running_var, layer.eps, activation=activation
        )[0]
    y, mean, variance = ops.batch_norm(x, *parameters, eps=layer.eps, activation=activation)
    with torch.no_grad():
        count = x.numel() / x.shape[1]
        layer.num_batches_tracked.add_(1)
        for running, measured in (
            (layer.running_mean, mean),
            (layer.running_var, variance * (count / (count - 1))),
        ):
            running.lerp_(measured.to(running.dtype), layer.momentum)
    return y


def _is_small(layer: nn.Module, x: Tensor, activation: str) -> bool:
    on_cpu = not x.is_cuda and backends.current_backend() == "auto" and not torch.compiler.is_compiling()
    return on_cpu and layer.training and x.numel() < (40_000 if activation == "gelu" else 90_000)


def is_plain_norm(layer: Any, x: Tensor) -> bool:
    """Return whether kernels can do for `x` what this layer does."""
    return (
        untouched(layer, nn.BatchNorm2d)
        and layer.affine
        and layer.track_running_stats
        and layer.momentum is not None
        and x.dim() == 4
        and (not layer.training or x.numel() > x.shape[1])  # else it raises the right error
        and backends.use_kernels("batch_norm", x)
    )

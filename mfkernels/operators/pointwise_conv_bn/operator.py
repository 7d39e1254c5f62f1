from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...checks import as_widest, check_argument, check_tensor, register_fake
from ..batch_norm import batch_norm
from ..dynamic_conv2d.operator import convolve_pointwise
from ..layout import empty_map, memory_format
from ..runner import Runner
from .reference import pointwise_conv_bn_reference

OP = "pointwise_conv_bn"


def pointwise_conv_bn(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Apply a 1x1 convolution, batch normalisation by given statistics, and the activation, in one pass.

    `y = activation((W x - mean) / sqrt(variance + eps) * gamma + beta)`: what a network does in eval mode.
    `mfkernels.nn.conv_norm` calls it for an `nn.Conv2d` and its `nn.BatchNorm2d`.

    Args:
        x: (B, C, H, W), any strides.
        weight: (O, C, 1, 1).
        gamma: (O,).
        beta: (O,).
        mean: (O,).
        variance: (O,).
        eps: added to the variance.
        activation: "none" or "gelu" (the exact one).

    Kernels: float32, float64, bfloat16; all arguments of one dtype and on one device. Under autocast all
    become the widest of their dtypes.

    Returns:
        y: (B, O, H, W) in x's dtype and memory format.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `x`.
        ValueError: a shape, a device or `activation` does not fit.

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 2; Hendrycks and Gimpel, Gaussian
    Error Linear Units, 2016.
    """
    return _run(x, weight, gamma, beta, mean, variance, eps, activation)


def _is_apart(tracked, x, *others) -> bool:
    return tracked and x.dim() == 4 and x.numel() > 0


def _apart(x, weight, gamma, beta, mean, variance, eps, activation) -> Tensor:
    """Apply the convolution and the norm apart, whose gradients need the map between them.

    In the convolution's weights the norm would make gradients of gamma inexact.
    """
    # Ours reads pixels that lie side by side.
    convolve = F.conv2d if memory_format(x) == torch.channels_last else convolve_pointwise
    y = batch_norm(convolve(x, weight), gamma, beta, mean, variance, eps, activation)[0]
    return y.contiguous(memory_format=memory_format(x))


def _check(x, weight, gamma, beta, mean, variance, eps, activation) -> None:
    _, channels, height, width = check_tensor(OP, "x", x, "B C H W").shape
    if channels * height * width == 0:
        raise ValueError(f"{OP}: x must have channels and pixels, got shape {tuple(x.shape)}")
    outputs = check_tensor(OP, "weight", weight, "O C 1 1").shape[0]
    check_argument(OP, "weight", weight, "O C 1 1", (outputs, channels, 1, 1), "x", x)
    for name, value in dict(gamma=gamma, beta=beta, mean=mean, variance=variance).items():
        check_argument(OP, name, value, "O", (outputs,), "x", x)
    if activation not in ("none", "gelu"):
        raise ValueError(f"{OP}: activation must be 'none' or 'gelu', got {activation!r}")


@register_fake(OP)
def _(x, weight, gamma, beta, mean, variance, eps=1e-5, activation="none"):
    _check(x, weight, gamma, beta, mean, variance, eps, activation)
    return empty_map(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


@register_fake(f"{OP}_backward")
def _(grad_y, x, weight, gamma, beta, mean, variance, eps=1e-5, activation="none"):
    return empty_map(x, x.shape), *(torch.empty_like(t) for t in (weight, gamma, beta, mean, variance))


def backward_by(convolve: Callable[..., Tensor], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradients by the norm's operator and a convolution.

    `convolve(x, weight)` computes again the map between them, `gradients(grad, x, weight)` the gradients of x
    and of the weight.
    """

    def backward(
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float = 1e-5,
        activation: str = "none",
    ) -> tuple[Tensor, ...]:
        for name, value in (("grad_y", grad_y), ("x", x), ("weight", weight)):
            check_tensor(OP, name, value, "O C 1 1" if name == "weight" else "B C H W")
        norm = gamma, beta, mean, variance, False, eps, activation
        between = convolve(x, weight)
        grad, *numbers = torch.ops.mfkernels.batch_norm_backward(grad_y, None, None, between, *norm)
        return *gradients(grad, x, weight), *numbers

    return backward


# On a CPU ours: the same bits every time.
def _settings(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    none = weight.new_empty(0, *weight.shape), x.new_empty(x.shape[0], 0)
    return x, weight, *none, None, None, [1, 1], [0, 0], [1, 1], 1, 0.1


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mfkernels.dynamic_conv2d(*_settings(x, weight))


def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.mfkernels.dynamic_conv2d_backward(grad, *_settings(x, weight))[:2]


torch.library.impl(f"mfkernels::{OP}_backward", "cpu")(backward_by(_convolve, _gradients))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    return *_run.backward(grad_y, *ctx.saved_tensors, ctx.eps, ctx.activation), None, None


_run = Runner(
    *(OP, pointwise_conv_bn_reference, _check, _setup_context, _backward),
    library=_apart,
    by_library=_is_apart,
    match=as_widest,
)

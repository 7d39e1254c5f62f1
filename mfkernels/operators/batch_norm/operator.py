import torch
from torch import Tensor

from ...checks import as_given, check_shape, check_tensor, register_fake
from ..layout import empty_map
from ..runner import Runner
from .reference import batch_norm_reference

OP = "batch_norm"
ACTIVATIONS = ("none", "gelu")


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of a feature map, and the activation after it.

    `y = activation((x - mean) / sqrt(variance + eps) * weight + bias)`. `mfkernels.nn.normalize` calls it for
    an `nn.BatchNorm2d`, and updates its running statistics.

    Args:
        x: (B, C, H, W), any strides.
        weight: (C,).
        bias: (C,).
        mean: (C,), or None: that of each channel over samples and pixels.
        variance: (C,), or None, as `mean` is: that of each channel, divided by the number of its pixels.
        eps: added to the variance.
        activation: "none" or "gelu" (the exact one).

    Kernels: float32, float64, bfloat16. The arguments are of x's dtype or, where that is a half precision, of
    float32, each as it likes, under autocast, too. All on one device.

    Returns:
        y: (B, C, H, W) in x's dtype and memory format.
        mean, variance: (C,), those that were taken; measured ones float32 where x is of half precision.
        Gradients flow through all three.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype does not go with that of `x`.
        ValueError: a shape, a device or `activation` does not fit, or only one of `mean` and `variance` is
            given.

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 1; Hendrycks and Gimpel, Gaussian
    Error Linear Units, 2016.
    """
    return _run(x, weight, bias, mean, variance, eps, activation)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    activation: str,
) -> None:
    check_tensor(OP, "x", x, "B C H W")
    if (mean is None) != (variance is None):
        absent, other = ("mean", "variance") if mean is None else ("variance", "mean")
        raise ValueError(f"{OP}: {absent} is None and {other} is given, expected both or none")
    given: dict[str, object] = dict(weight=weight, bias=bias)
    if mean is not None:
        given |= dict(mean=mean, variance=variance)
    for name, argument in given.items():
        value = check_tensor(OP, name, argument, "C")
        if value.dtype not in (x.dtype, _sums(x)):
            also = "" if _sums(x) == x.dtype else f" or {_sums(x)}"
            raise TypeError(f"{OP}: {name} must have the dtype of x, {x.dtype}{also}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{OP}: {name} must be on the device of x, {x.device}, got {value.device}")
        check_shape(OP, name, value, "C", (x.shape[1],))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be 'none' or 'gelu', got {activation!r}")


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@register_fake(OP)
def _(x, weight, bias, mean=None, variance=None, eps=1e-5, activation="none"):
    _check(x, weight, bias, mean, variance, eps, activation)
    size = x.shape[1] if mean is None else 0
    statistics = [x.new_empty(size, dtype=_sums(x)) for _ in range(2)]
    return empty_map(x, x.shape), *statistics


@register_fake(f"{OP}_backward")
def _(
    grad_y,
    grad_mean,
    grad_variance,
    x,
    weight,
    bias,
    mean,
    variance,
    measured,
    eps=1e-5,
    activation="none",
):
    return empty_map(x, x.shape), *(torch.empty_like(t) for t in (weight, bias, mean, variance))


def _setup_context(ctx, inputs, output):
    x, weight, bias, mean, variance, ctx.eps, ctx.activation = inputs
    ctx.measured = mean is None
    statistics = output[1:]
    ctx.set_materialize_grads(False)
    if not ctx.measured:
        ctx.mark_non_differentiable(*statistics)
        statistics = (mean, variance)
    ctx.save_for_backward(x, weight, bias, *statistics)


def _backward(ctx, grad_y, grad_mean, grad_variance):
    saved = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(saved[0])
    grads = _run.backward(grad_y, grad_mean, grad_variance, *saved, ctx.measured, ctx.eps, ctx.activation)
    statistics = (None, None) if ctx.measured else grads[3:]
    return *grads[:3], *statistics, None, None


def _result(outputs, x, weight, bias, mean, variance, eps, activation):
    return outputs if mean is None else (outputs[0], mean, variance)


_run = Runner(OP, batch_norm_reference, _check, _setup_context, _backward, _result, match=as_given)

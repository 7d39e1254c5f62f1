from torch import Tensor

from ...checks import check_argument, check_tensor, register_fake
from ..layout import empty_map
from ..runner import Runner
from .reference import global_response_norm_reference

OP = "global_response_norm"
MEANS = ("channels", "released")


def global_response_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: str = "channels", eps: float = 1e-6
) -> Tensor:
    """Global response normalisation, residual included.

    `y = gamma * x * n + beta + x` with `n = g / (mean(g) + eps)` and `g[b,c]` the L2 norm of a channel over
    its pixels.

    Args:
        x: (B, C, H, W), any strides.
        gamma: (C,).
        beta: (C,).
        mean: "channels": the mean of g over the channels of a sample, as published in ConvNeXt V2;
            "released": g itself, as the released code of Dynamic Mobile-Former has it: n is nearly 1.
        eps: added to the mean.

    All of one dtype (kernels: float32, float64, bfloat16) and on one device. Under autocast they may
    differ, and the dtype of `x` is taken.

    Returns:
        (B, C, H, W) in x's dtype and memory format. The gradient of the norm of a channel of zeros is zero.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `x`.
        ValueError: a shape, a device or `mean` does not fit.

    Source: Woo et al., ConvNeXt V2, CVPR 2023, section 3; Yun and Ro, Dynamic Mobile-Former, equation 5, and
    its released code.
    """
    return _run(x, gamma, beta, mean, eps)


def _check(x: Tensor, gamma: Tensor, beta: Tensor, mean: str, eps: float) -> None:
    check_tensor(OP, "x", x, "B C H W")
    for name, value in (("gamma", gamma), ("beta", beta)):
        check_argument(OP, name, value, "C", (x.shape[1],), "x", x)
    if mean not in MEANS:
        raise ValueError(f"{OP}: mean must be 'channels' or 'released', got {mean!r}")


@register_fake(OP)
def _(x, gamma, beta, mean="channels", eps=1e-6):
    _check(x, gamma, beta, mean, eps)
    return empty_map(x, x.shape)


@register_fake(f"{OP}_backward")
def _(grad_out, x, gamma, beta, mean="channels", eps=1e-6):
    return empty_map(x, x.shape), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


def _setup_context(ctx, inputs, output):
    x, gamma, beta, ctx.mean, ctx.eps = inputs
    ctx.save_for_backward(x, gamma, beta)


def _backward(ctx, grad_out):
    x, gamma, beta = ctx.saved_tensors
    return *_run.backward(grad_out, x, gamma, beta, ctx.mean, ctx.eps), None, None


_run = Runner(OP, global_response_norm_reference, _check, _setup_context, _backward)

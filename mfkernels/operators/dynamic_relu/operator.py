from torch import Tensor

from ...checks import check_argument, check_like, check_shape, check_tensor, register_fake
from ..layout import empty_map, gradients_like, without_absent
from ..runner import Runner
from .reference import dynamic_relu_reference

OP = "dynamic_relu"


def dynamic_relu(
    x: Tensor, slopes: Tensor, intercepts: Tensor | None = None, attention: Tensor | None = None
) -> Tensor:
    """Dynamic ReLU: the maximum of K linear functions whose coefficients differ from sample to sample.

    `y[b,c,h,w] = max_k(slopes[b,k,c] * x[b,c,h,w] + intercepts[b,k,c])`. With `attention` the
    coefficients also differ from position to position: those of M tokens are mixed with the weights
    `attention[b,:,h,w]` where they are used; the (B,K,C,H,W) coefficients are never stored.

    Args:
        x: (B, C, H, W), any strides.
        slopes: (B, K, C), K >= 1; with `attention` (B, M, K, C).
        intercepts: None for zeros, or of the shape of `slopes`.
        attention: None, or (B, M, H, W), M >= 1. Need not sum to one.

    All of one dtype (kernels: float32, float64, bfloat16) and on one device. Under autocast they may
    differ, and the dtype of `x` is taken.

    Returns:
        (B, C, H, W) in x's dtype and memory format. Where several functions attain the maximum, the
        gradient is split evenly among them, as that of `torch.amax` is.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `x`.
        ValueError: a shape or a device does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2 (dynamic ReLU from a token) and
    equation 3 (spatial-aware); Chen et al., Dynamic ReLU, ECCV 2020, equation 2.
    """
    return _run(x, slopes, intercepts, attention)


def _check(x: Tensor, slopes: Tensor, intercepts: Tensor | None, attention: Tensor | None) -> None:
    check_tensor(OP, "x", x, "B C H W")
    batch, channels, height, width = x.shape
    shape: tuple[int, ...]
    if attention is None:
        check_tensor(OP, "slopes", slopes, "B K C")
        axes, shape = "B K C", (batch, slopes.shape[1], channels)
    else:
        check_tensor(OP, "attention", attention, "B M H W")
        check_like(OP, "attention", attention, "x", x)
        check_tensor(OP, "slopes", slopes, "B M K C")
        tokens = attention.shape[1]
        check_shape(OP, "attention", attention, "B M H W", (batch, tokens, height, width))
        if tokens < 1:
            raise ValueError(f"{OP}: attention must have at least one token (M >= 1), got M = 0")
        axes, shape = "B M K C", (batch, tokens, slopes.shape[2], channels)
    check_like(OP, "slopes", slopes, "x", x)
    check_shape(OP, "slopes", slopes, axes, shape)
    if shape[-2] < 1:
        raise ValueError(f"{OP}: slopes must hold at least one function (K >= 1), got K = 0")
    if intercepts is not None:
        check_argument(OP, "intercepts", intercepts, axes, shape, "x", x)


@register_fake(OP)
def _(x, slopes, intercepts=None, attention=None):
    _check(x, slopes, intercepts, attention)
    return empty_map(x, x.shape)


@register_fake(f"{OP}_backward")
def _(grad_out, x, slopes, intercepts=None, attention=None):
    return empty_map(x, x.shape), *gradients_like((slopes, intercepts, attention))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    inputs = ctx.saved_tensors
    return tuple(without_absent(inputs, _run.backward(grad_out, *inputs)))


_run = Runner(OP, dynamic_relu_reference, _check, _setup_context, _backward)

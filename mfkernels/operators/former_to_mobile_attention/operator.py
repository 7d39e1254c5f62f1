from torch import Tensor

from ...checks import check_heads, check_like, check_shape, check_tensor, register_fake
from ..layout import empty_map
from ..runner import Runner
from .reference import former_to_mobile_attention_reference

OP = "former_to_mobile_attention"


def former_to_mobile_attention(
    x: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None
) -> Tensor:
    """Cross attention from a few tokens to a feature map, residual included; queries are the pixels.

    Head j takes the j-th of `num_heads` contiguous slices of the channels:
    `y_j = x_j + (softmax(scale * x_j^T @ k_j^T over the M tokens) @ v_j)^T`, in one pass over the map.

    Args:
        x: (B, C, H, W), any strides.
        k: (B, M, C), the keys of M >= 1 tokens.
        v: (B, M, C), their values.
        num_heads: number of heads, a divisor of C.
        scale: factor of the logits, by default `(C / num_heads) ** -0.5`.

    All of one dtype (kernels: float32, float64, bfloat16) and on one device. Under autocast they may
    differ, and the dtype of `x` is taken.

    Returns:
        (B, C, H, W) in x's dtype and memory format. The gradient of a constant added to all of `k` is
        zero up to rounding: the softmax over the tokens does not see it.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `x`.
        ValueError: a shape, a device or `num_heads` does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, equation 2, without its projections.
    """
    return _run(x, k, v, num_heads, scale)


def _check(x: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None) -> None:
    check_tensor(OP, "x", x, "B C H W")
    check_tensor(OP, "k", k, "B M C")
    check_tensor(OP, "v", v, "B M C")
    check_like(OP, "k", k, "x", x)
    check_like(OP, "v", v, "x", x)
    batch, channels, _, _ = x.shape
    tokens = k.shape[1]
    check_shape(OP, "k", k, "B M C", (batch, tokens, channels))
    check_shape(OP, "v", v, "B M C", (batch, tokens, channels))
    if tokens < 1:
        raise ValueError(f"{OP}: k must hold at least one token (M >= 1), got M = 0")
    check_heads(OP, num_heads, channels)


@register_fake(OP)
def _(x, k, v, num_heads, scale=None):
    _check(x, k, v, num_heads, scale)
    return empty_map(x, x.shape)


@register_fake(f"{OP}_backward")
def _(grad_out, x, k, v, num_heads, scale=None):
    return empty_map(x, x.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    x, k, v, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(x, k, v)


def _backward(ctx, grad_out):
    x, k, v = ctx.saved_tensors
    return *_run.backward(grad_out, x, k, v, ctx.num_heads, ctx.scale), None, None


_run = Runner(OP, former_to_mobile_attention_reference, _check, _setup_context, _backward)

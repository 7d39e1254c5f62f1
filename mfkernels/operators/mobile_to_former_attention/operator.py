import torch
from torch import Tensor

from ...checks import check_heads, check_like, check_mask, check_shape, check_tensor, register_fake
from ..layout import empty_map
from ..runner import Runner
from .reference import mobile_to_former_attention_reference

OP = "mobile_to_former_attention"


def mobile_to_former_attention(
    x: Tensor,
    q: Tensor,
    num_heads: int,
    scale: float | None = None,
    return_logits: bool = False,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross attention from a feature map to a few tokens; keys and values are the pixels themselves.

    Head j takes the j-th of `num_heads` contiguous slices of the channels:
    `logits = scale * q_j @ x_j`, `out_j = softmax(logits over the H*W pixels) @ x_j^T`. The map is
    read once (online softmax) and the attention is not stored.

    Args:
        x: (B, C, H, W), any strides, H*W >= 1.
        q: (B, M, C), the queries of M tokens.
        num_heads: number of heads, a divisor of C.
        scale: factor of the logits, by default `(C / num_heads) ** -0.5`.
        return_logits: also return the scaled logits before the softmax.
        mask: (B, H, W), bool, True where there is no image. Such a pixel takes no part: its weight is zero,
            its gradient is zero, and what it holds, NaN or infinity too, does not matter.

    All but the mask of one dtype (kernels: float32, float64, bfloat16), and all on one device. Under
    autocast dtypes may differ, and that of `x` is taken.

    Returns:
        (B, M, C); with `return_logits` the pair of it and (B, num_heads, M, H, W). A masked pixel's logits
        are zero, not -inf, so that what is computed of them stays finite, and what comes out for a sample
        whose pixels are all masked is zero.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `x`; `mask` is no
            bool tensor.
        ValueError: a shape, a device or `num_heads` does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, equation 1, without its projections.
    """
    return _run(x, q, num_heads, scale, return_logits, mask)


def _check(
    x: Tensor, q: Tensor, num_heads: int, scale: float | None, return_logits: bool, mask: Tensor | None
) -> None:
    check_tensor(OP, "x", x, "B C H W")
    check_tensor(OP, "q", q, "B M C")
    check_like(OP, "q", q, "x", x)
    batch, channels, height, width = x.shape
    check_shape(OP, "q", q, "B M C", (batch, q.shape[1], channels))
    check_heads(OP, num_heads, channels)
    if height * width < 1:
        raise ValueError(f"{OP}: x must have at least one pixel, got shape {tuple(x.shape)}")
    if mask is not None:
        check_mask(OP, mask, x)


@register_fake(OP)
def _(x, q, num_heads, scale=None, return_logits=False, mask=None):
    _check(x, q, num_heads, scale, return_logits, mask)
    batch, _, height, width = x.shape
    tokens = q.shape[1]
    shape = (batch, num_heads, tokens, height, width) if return_logits else (0,)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape),
        x.new_empty(shape),
        x.new_empty((batch, num_heads, tokens, 2), dtype=sums),
    )


@register_fake(f"{OP}_backward")
def _(grad_out, grad_logits, x, q, softmax_stats, num_heads, scale=None, mask=None):
    return empty_map(x, x.shape), q.new_empty(q.shape)


def _setup_context(ctx, inputs, output):
    x, q, ctx.num_heads, ctx.scale, ctx.return_logits, mask = inputs
    _, logits, softmax_stats = output
    ctx.save_for_backward(x, q, softmax_stats, mask)
    # Gradients that nobody asked for come as None and cost nothing.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((softmax_stats,) if ctx.return_logits else (logits, softmax_stats)))


def _backward(ctx, grad_out, grad_logits, grad_softmax_stats):
    x, q, softmax_stats, mask = ctx.saved_tensors
    if grad_out is None and grad_logits is None:
        return None, None, None, None, None, None
    grad_x, grad_q = _run.backward(grad_out, grad_logits, x, q, softmax_stats, ctx.num_heads, ctx.scale, mask)
    return grad_x, grad_q, None, None, None, None


def _result(outputs, x, q, num_heads, scale, return_logits, mask):
    out, logits, _ = outputs
    return (out, logits) if return_logits else out


_run = Runner(OP, mobile_to_former_attention_reference, _check, _setup_context, _backward, _result)

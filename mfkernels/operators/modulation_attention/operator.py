from torch import Tensor

from ...checks import check_argument, check_like, check_shape, check_tensor, register_fake
from ..layout import empty_map
from ..runner import Runner
from .reference import modulation_attention_reference

OP = "modulation_attention"
FORMS = ("released", "paper")


def modulation_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    scale: float | None = None,
    form: str = "released",
    window_size: int | None = None,
) -> Tensor:
    """Single-head attention among the pixels of a map, modulated by a gate; sigmoids included.

    With N = H W pixels and P = softmax(scale * q^T k) over the keys: "released" is
    `(sigmoid(v) P^T) * sigmoid(gate)`, "paper" `sigmoid(v P^T) * sigmoid(gate)`. The N x N weights are never
    stored; the backward pass makes them again.

    Args:
        q, k: (B, D, H, W), any strides.
        v, gate: (B, C, H, W), before their sigmoids.
        scale: factor of the logits, by default `D ** -0.5`.
        form: "released", as the released checkpoints need it, or "paper".
        window_size: None, or attention only within square windows of that many pixels a side, which must
            divide H and W.

    All of one dtype (kernels: float32, float64, bfloat16) and on one device. Under autocast they may
    differ, and the dtype of `q` is taken.

    Returns:
        (B, C, H, W) in v's dtype and memory format.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `q`.
        ValueError: a shape, a device, `form` or `window_size` does not fit.

    Source: Zheng, iFormer, ICLR 2025, equation 3, and its released code, which takes the sigmoid of v before
    the attention.
    """
    return _run(q, k, v, gate, scale, form, window_size)


def _check(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float | None, form: str, window_size: int | None
) -> None:
    check_tensor(OP, "q", q, "B D H W")
    check_argument(OP, "k", k, "B D H W", q.shape, "q", q)
    check_tensor(OP, "v", v, "B C H W")
    check_like(OP, "v", v, "q", q)
    batch, depth, height, width = q.shape
    shape = (batch, v.shape[1], height, width)
    check_shape(OP, "v", v, "B C H W", shape)
    check_argument(OP, "gate", gate, "B C H W", shape, "q", q)
    if depth < 1:
        raise ValueError(f"{OP}: q must have at least one channel (D >= 1), got D = 0")
    if form not in FORMS:
        raise ValueError(f"{OP}: form must be 'released' or 'paper', got {form!r}")
    if window_size is None:
        return
    if not isinstance(window_size, int) or isinstance(window_size, bool):
        raise TypeError(f"{OP}: window_size must be None or an int, got {type(window_size).__name__}")
    if window_size < 1 or height % window_size or width % window_size:
        raise ValueError(
            f"{OP}: window_size must be positive and divide height and width, got {window_size} for "
            f"{height} x {width} pixels"
        )


@register_fake(OP)
def _(q, k, v, gate, scale=None, form="released", window_size=None):
    _check(q, k, v, gate, scale, form, window_size)
    return empty_map(v, v.shape)


@register_fake(f"{OP}_backward")
def _(grad_out, out, q, k, v, gate, scale=None, form="released", window_size=None):
    return tuple(empty_map(x, x.shape) for x in (q, k, v, gate))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx, grad_out):
    grads = _run.backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None


_run = Runner(OP, modulation_attention_reference, _check, _setup_context, _backward)

from typing import Any

import torch
from torch import Tensor

from ...checks import as_widest, check_argument, check_heads, check_tensor, register_fake
from ..layout import gradients_like, without_absent
from ..runner import Runner
from .library import former_block_by_library
from .reference import former_block_reference

OP = "former_block"
# From these numbers on PyTorch's operators were measured to be faster. With gradients the number counts
# multiplications by one (d, d) matrix, since the kernel's backward pass computes everything again; without
# gradients it counts a batch's tokens, and float32 tokens are left to the kernel.
_TRAINED, _INFERRED = 1_600_000, 96


def former_block(
    tokens: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    num_heads: int = 4,
    form: str = "released",
    eps: float = 1e-5,
) -> Tensor:
    """Update a few tokens as the Former of a block does.

    It has self-attention, a feed-forward network, residuals and norms.

    "released" is Mobile-Former's, with norms after the sums; keys and values are the tokens themselves:
    `z = norm1(x + proj(attention(q(x), x, x)))`, `y = norm2(z + fc2(gelu(fc1(z))))`.
    "standard" is that of DMF, with norms before: `z = x + proj(attention(q, k, v))`, q, k and v being the
    thirds of `qkv(norm1(x))`, and `y = z + fc2(gelu(fc1(norm2(z))))`.

    Args:
        tokens: (B, T, d), any strides.
        qkv_weight, qkv_bias: (d, d) and (d,), the queries' layer; in the standard form (3 d, d) and (3 d,).
        proj_weight, proj_bias: (d, d) and (d,).
        norm1_weight, norm1_bias: (d,).
        fc1_weight, fc1_bias: (h, d) and (h,). In the released form None for no feed-forward network.
        fc2_weight, fc2_bias: (d, h) and (d,).
        norm2_weight, norm2_bias: (d,).
        num_heads: a divisor of d; logits are multiplied by `(d / num_heads) ** -0.5`.
        form: "released" or "standard".
        eps: of the norms.

    Biases of linear layers may be None. All of one dtype (kernels: float32, float64, bfloat16; norms and
    softmax are computed in float32 at least) and on one device. Under autocast they may differ, and the
    widest dtype is taken.

    Returns:
        (B, T, d), contiguous.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `tokens`.
        ValueError: a shape, a device, `num_heads` or `form` does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, and Yun and Ro, Dynamic Mobile-Former, section 3.2 of both.
    """
    parameters = (
        *(qkv_weight, qkv_bias, proj_weight, proj_bias, norm1_weight, norm1_bias),
        *(fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm2_weight, norm2_bias),
    )
    return _run(tokens, *parameters, num_heads, form, eps)


def _by_library(tracked: bool, tokens: Tensor, *others: Any) -> bool:
    if tracked:
        return tokens.numel() * tokens.shape[-1:].numel() > _TRAINED
    return tokens.dtype != torch.float32 and tokens.shape[:2].numel() > _INFERRED


def _check(tokens: Tensor, *arguments: Any) -> None:
    *parameters, num_heads, form, _ = arguments
    check_tensor(OP, "tokens", tokens, "B T d")
    if form not in ("released", "standard"):
        raise ValueError(f"{OP}: form must be 'released' or 'standard', got {form!r}")
    width = tokens.shape[2]
    if width < 1:
        raise ValueError(f"{OP}: tokens must have a width of at least 1, got shape {tuple(tokens.shape)}")
    check_heads(OP, num_heads, width, "the width of tokens", "values")
    ffn = parameters[6] is not None
    if form == "standard" and not ffn:
        raise TypeError(f"{OP}: fc1_weight must be given in the standard form, got None")
    hidden = check_tensor(OP, "fc1_weight", parameters[6], "h d").shape[0] if ffn else 0
    queries, axes = (3 * width, "3d") if form == "standard" else (width, "d")
    shapes = {
        "qkv": (f"{axes} d", (queries, width)),
        "proj": ("d d", (width, width)),
        "norm1": ("d", (width,)),
        "fc1": ("h d", (hidden, width)),
        "fc2": ("d h", (width, hidden)),
        "norm2": ("d", (width,)),
    }
    values = iter(parameters)
    for layer, (words, shape) in shapes.items():
        present = ffn or layer in ("qkv", "proj", "norm1")
        for part, optional in (("weight", False), ("bias", not layer.startswith("norm"))):
            name, value = f"{layer}_{part}", next(values)
            if not present:
                if value is not None:
                    raise TypeError(f"{OP}: {name} must be None without fc1_weight")
                continue
            if value is None:
                if optional:
                    continue
                raise TypeError(f"{OP}: {name} must be a tensor, got NoneType")
            expected = words if part == "weight" else words.split()[0]
            check_argument(OP, name, value, expected, shape[: len(expected.split())], "tokens", tokens)


@register_fake(OP)
def _(tokens, *others):
    return tokens.new_empty(tokens.shape)


@register_fake(f"{OP}_backward")
def _(grad_out, tokens, *others):
    return gradients_like((tokens, *others[:12]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:13])
    ctx.settings = inputs[13:]


def _backward(ctx, grad_out):
    inputs = ctx.saved_tensors
    grads = _run.backward(grad_out, *inputs, *ctx.settings)
    return *without_absent(inputs, grads), None, None, None


_run = Runner(
    *(OP, former_block_reference, _check, _setup_context, _backward),
    library=former_block_by_library,
    by_library=_by_library,
    match=as_widest,
)

from typing import Any

import torch
from torch import Tensor

from ...checks import as_widest, check_like, check_shape, check_tensor, register_fake
from ..layout import gradients_like, without_absent
from ..runner import Runner
from .reference import token_hyper_reference

OP = "token_hyper"
NAMES = ("weight1", "bias1", "weight2", "bias2")


def token_hyper(
    token: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    other_weight1: Tensor | None = None,
    other_bias1: Tensor | None = None,
    other_weight2: Tensor | None = None,
    other_bias2: Tensor | None = None,
    num_functions: int = 2,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the slopes of a block's dynamic ReLUs from a token, by one hyper network or by two at once.

    `theta = hardsigmoid(W2 relu(W1 token + b1) + b2)`, in [0, 1]; the slopes are `2 theta` for the first
    function, in [0, 2], and `2 theta - 1` for the second, in [-1, 1].

    Args:
        token: (B, d), any strides.
        weight1, bias1: (h, d) and (h,).
        weight2, bias2: (m C, h) and (m C,): the first function's channels, then the second's.
        other_weight1, other_bias1, other_weight2, other_bias2: those of a second network, or all None.
        num_functions: m, 1 or 2.

    All of one dtype (kernels: float32, float64, bfloat16) and on one device. Under autocast they may
    differ, and the widest dtype is taken.

    Returns:
        (B, m, C), as `dynamic_relu` takes it; with two networks a pair of them. Relu and hardsigmoid have no
        gradient at their kinks.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `token`.
        ValueError: a shape, a device or `num_functions` does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2; the slopes' ranges from the released code.
    """
    parameters = (weight1, bias1, weight2, bias2)
    others = (other_weight1, other_bias1, other_weight2, other_bias2)
    return _run(token, *parameters, *others, num_functions)


def _check(token: Tensor, *arguments: Any) -> None:
    *parameters, num_functions = arguments
    check_tensor(OP, "token", token, "B d")
    if num_functions not in (1, 2) or isinstance(num_functions, bool):
        raise ValueError(f"{OP}: num_functions must be 1 or 2, got {num_functions!r}")
    for prefix, values in (("", parameters[:4]), ("other_", parameters[4:])):
        if prefix and all(value is None for value in values):
            continue
        for name, value, axes in zip(NAMES, values, ("h d", "h", "mC h", "mC"), strict=True):
            check_tensor(OP, prefix + name, value, axes)
            check_like(OP, prefix + name, value, "token", token)
        hidden, outputs = values[0].shape[0], values[2].shape[0]
        shapes = ((hidden, token.shape[1]), (hidden,), (outputs, hidden), (outputs,))
        for name, value, axes, shape in zip(NAMES, values, ("h d", "h", "mC h", "mC"), shapes, strict=True):
            check_shape(OP, prefix + name, value, axes, shape)
        if outputs % num_functions:
            raise ValueError(
                f"{OP}: {prefix}weight2 must have a multiple of num_functions = {num_functions} outputs, "
                f"got {outputs}"
            )


def _slopes(token: Tensor, weight2: Tensor | None, num_functions: int) -> Tensor:
    if weight2 is None:
        return token.new_empty(0)
    return token.new_empty(token.shape[0], num_functions, weight2.shape[0] // num_functions)


@register_fake(OP)
def _(token, *others):
    return _slopes(token, others[2], others[8]), _slopes(token, others[6], others[8])


@register_fake(f"{OP}_backward")
def _(grad_slopes, grad_other, token, *others):
    return gradients_like((token, *others[:8]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.num_functions = inputs[9]


def _backward(ctx, grad_slopes, grad_other):
    inputs = ctx.saved_tensors
    token, weight2, other_weight2 = inputs[0], inputs[3], inputs[7]
    if grad_slopes is None:
        grad_slopes = torch.zeros_like(_slopes(token, weight2, ctx.num_functions))
    if grad_other is None:
        grad_other = torch.zeros_like(_slopes(token, other_weight2, ctx.num_functions))
    grads = _run.backward(grad_slopes, grad_other, *inputs, ctx.num_functions)
    return *without_absent(inputs, grads), None


def _result(outputs, token, *arguments):
    slopes, other_slopes = outputs
    return slopes if arguments[4] is None else (slopes, other_slopes)


_run = Runner(OP, token_hyper_reference, _check, _setup_context, _backward, _result, match=as_widest)

"""Leaving Python: programs without our operators, for runtimes that do not have them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operators.batch_norm.reference import batch_norm_reference
from .operators.dynamic_conv2d.reference import Pair, add_biases, mix, output_size
from .operators.dynamic_relu.reference import dynamic_relu_reference
from .operators.former_block.reference import former_block_reference
from .operators.former_to_mobile_attention.reference import former_to_mobile_attention_reference
from .operators.global_response_norm.reference import global_response_norm_reference
from .operators.mobile_to_former_attention.reference import hide_logits, mobile_to_former_attention_reference
from .operators.modulation_attention.reference import modulation_attention_reference
from .operators.token_hyper.reference import token_hyper_reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return our operators as PyTorch's own: a table for `ExportedProgram.run_decompositions`.

    The program that this gives has none of our operators, and every tool that takes programs of PyTorch takes
    it, `torch.onnx.export` among them:

        program = torch.export.export(model, (x,)).run_decompositions(mfkernels.decompositions())
        torch.onnx.export(program, f="model.onnx", dynamo=True)
    """
    ops = torch.ops.mfkernels
    return {
        ops.batch_norm.default: _batch_norm,
        ops.dynamic_relu.default: dynamic_relu_reference,
        ops.former_block.default: former_block_reference,
        ops.former_to_mobile_attention.default: former_to_mobile_attention_reference,
        ops.global_response_norm.default: global_response_norm_reference,
        ops.modulation_attention.default: modulation_attention_reference,
        ops.mobile_to_former_attention.default: _mobile_to_former_attention,
        ops.pointwise_conv_bn.default: _pointwise_conv_bn,
        ops.token_hyper.default: _token_hyper,
        ops.dynamic_conv2d.default: _dynamic_conv2d,
    }


def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    if mean is None or variance is None:
        return batch_norm_reference(x, weight, bias, None, None, eps, activation)
    # PyTorch's own, which runtimes fold into the convolution before it.
    y = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps)
    y = torch.nn.functional.gelu(y) if activation == "gelu" else y
    return y, weight.new_empty(0), weight.new_empty(0)


def _mobile_to_former_attention(
    x: Tensor,
    q: Tensor,
    num_heads: int,
    scale: float | None = None,
    return_logits: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, logits = mobile_to_former_attention_reference(x, q, num_heads, scale, True, mask)
    flat = logits.flatten(3)
    flat = flat if mask is None else hide_logits(flat, mask.flatten(1)[:, None, None])
    top = flat.amax(-1)
    stats = torch.stack([top, torch.exp(flat - top[..., None]).sum(-1)], -1)
    return out, logits if return_logits else x.new_empty(0), stats


def _pointwise_conv_bn(x: Tensor, weight: Tensor, *norm: Any, **settings: Any) -> Tensor:
    return _batch_norm(torch.nn.functional.conv2d(x, weight), *norm, **settings)[0]


def _token_hyper(token: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    slopes = token_hyper_reference(token, *parameters)
    return slopes if isinstance(slopes, tuple) else (slopes, token.new_empty(0))


def _dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    basis_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    basis_scale: float,
) -> Tensor:
    """Compute a dynamic convolution as one product for every place of the kernel.

    Neither `unfold` nor a convolution with as many groups as the batch has samples can be exported for any
    batch size.
    """
    batch = x.shape[0]
    outputs, inputs, rows, columns = weight.shape
    mixed = mix(weight, basis, attention, basis_scale)
    height, width = output_size(x.shape[2:], (rows, columns), stride, padding, dilation)
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    y: Any = 0
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation[0], j * dilation[1]
            part = x[
                :,
                :,
                top : top + (height - 1) * stride[0] + 1 : stride[0],
                left : left + (width - 1) * stride[1] + 1 : stride[1],
            ]
            kernel = mixed[:, :, :, i, j]
            if inputs == 1 and outputs == groups:
                y = y + part * kernel[..., None]
            else:
                kernel = kernel.reshape(batch, groups, outputs // groups, inputs)
                y = y + (kernel @ part.reshape(batch, groups, inputs, -1)).reshape(
                    batch, outputs, height, width
                )
    return add_biases(y, attention, bias, basis_bias)

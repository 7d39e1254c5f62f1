from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


def dynamic_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    basis_bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    basis_scale: float = 0.1,
) -> Tensor:
    """Plain-PyTorch definition of `mfkernels.ops.dynamic_conv2d`; same arguments."""
    batch, _, height, width = x.shape
    outputs, inputs, *_ = weight.shape
    kernel = (weight.shape[2], weight.shape[3])
    depth = inputs * kernel[0] * kernel[1]
    mixed = mix(weight, basis, attention, basis_scale)
    columns = F.unfold(
        x, kernel, pair(dilation), pair(padding), pair(stride)
    )  # (B, C * kh * kw, output pixels)
    columns = columns.reshape(batch, groups, depth, columns.shape[2])
    y = mixed.reshape(batch, groups, outputs // groups, depth) @ columns
    y = y.reshape(batch, outputs, *output_size((height, width), kernel, stride, padding, dilation))
    return add_biases(y, attention, bias, basis_bias)


def mix(weight: Tensor, basis: Tensor, attention: Tensor, basis_scale: float) -> Tensor:
    """Return the kernels (B, O, C / groups, kh, kw) of the samples."""
    others = (attention @ basis.flatten(1)).view(attention.shape[0], *weight.shape)
    return weight + basis_scale * others


def add_biases(y: Tensor, attention: Tensor, bias: Tensor | None, basis_bias: Tensor | None) -> Tensor:
    """`y` with the biases of the samples."""
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1)
    if basis_bias is not None:
        y = y + (attention @ basis_bias)[..., None, None]
    return y


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: int | Pair, padding: int | Pair, dilation: int | Pair
) -> list[int]:
    """Height and width of the result of a convolution."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, pair(stride), pair(padding), pair(dilation), strict=True)
    ]


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int | torch.SymInt) else (value[0], value[1])

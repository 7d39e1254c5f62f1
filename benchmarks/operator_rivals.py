"""Other ways to write the operators in PyTorch, faster than the definitions at some shapes."""

import torch
from torch.nn import functional as F

from mfkernels.operators.dynamic_conv2d.reference import add_biases, mix
from mfkernels.operators.former_block.library import former_block_by_library


def dynamic_conv2d_grouped(
    x, weight, basis, attention, bias=None, basis_bias=None, stride=1, padding=0, dilation=1, groups=1,
    basis_scale=0.1,
):  # fmt: skip
    """The batch as groups of one convolution."""
    batch = x.shape[0]
    mixed = mix(weight, basis, attention, basis_scale).flatten(0, 1)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), mixed, None, stride, padding, dilation, groups * batch)
    return add_biases(y.view(batch, -1, *y.shape[2:]), attention, bias, basis_bias)


def dynamic_relu_by_maximum(x, slopes, intercepts=None, attention=None):
    """Of two functions without intercepts, by sample."""
    first, second = slopes[..., None, None].unbind(1)
    return torch.maximum(x * first, x * second)


def _heads(x, num_heads):
    """(B, T, C) or (B, C, H, W) to (B, heads, T or H W, C / heads)."""
    if x.dim() == 4:
        return x.reshape(x.shape[0], num_heads, -1, x.shape[2] * x.shape[3]).transpose(2, 3)
    return x.reshape(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)


def mobile_to_former_attention_sdpa(x, q, num_heads, scale=None, return_logits=False):
    pixels = _heads(x, num_heads)
    out = F.scaled_dot_product_attention(_heads(q, num_heads), pixels, pixels, scale=scale)
    return out.transpose(1, 2).reshape(q.shape)


def former_to_mobile_attention_sdpa(x, k, v, num_heads, scale=None):
    keys, values = _heads(k, num_heads), _heads(v, num_heads)
    out = F.scaled_dot_product_attention(_heads(x, num_heads), keys, values, scale=scale)
    return x + out.transpose(2, 3).reshape(x.shape)


def modulation_attention_sdpa(q, k, v, gate, scale=None, form="released"):
    q, k, v = (t.flatten(2).transpose(1, 2) for t in (q, k, torch.sigmoid(v)))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(gate.shape) * torch.sigmoid(gate)


def token_hyper_hardsigmoid(
    token, weight1, bias1, weight2, bias2, other_weight1=None, other_bias1=None, other_weight2=None,
    other_bias2=None, num_functions=2,
):  # fmt: skip
    def slopes(weight1, bias1, weight2, bias2):
        theta = F.hardsigmoid(F.linear(F.relu(F.linear(token, weight1, bias1)), weight2, bias2))
        theta = 2 * theta.view(token.shape[0], num_functions, -1)
        return torch.stack([theta[:, 0], theta[:, 1] - 1], 1) if num_functions == 2 else theta

    own = slopes(weight1, bias1, weight2, bias2)
    if other_weight1 is None:
        return own
    return own, slopes(other_weight1, other_bias1, other_weight2, other_bias2)


def batch_norm_by_library(x, weight, bias, mean=None, variance=None, eps=1e-5, activation="none"):
    """PyTorch's own layer, of measured statistics, which have no gradients; given ones by two factors."""
    if mean is None:
        mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
        y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)
        count = x.numel() / x.shape[1]
        variance = variance * ((count - 1) / count)
    else:
        factor = weight * (variance + eps).rsqrt()
        y = x * factor.view(-1, 1, 1) + (bias - mean * factor).view(-1, 1, 1)
    return F.gelu(y) if activation == "gelu" else y, mean, variance


def pointwise_conv_bn_folded(x, weight, gamma, beta, mean, variance, eps=1e-5, activation="none"):
    """The batch norm in the convolution's weights."""
    factor = gamma * (variance + eps).rsqrt()
    y = F.conv2d(x, weight * factor.view(-1, 1, 1, 1), beta - mean * factor)
    return F.gelu(y) if activation == "gelu" else y


RIVALS = {
    "batch_norm": batch_norm_by_library,
    "dynamic_conv2d": dynamic_conv2d_grouped,
    "dynamic_relu": dynamic_relu_by_maximum,
    "former_block": former_block_by_library,
    "former_to_mobile_attention": former_to_mobile_attention_sdpa,
    "mobile_to_former_attention": mobile_to_former_attention_sdpa,
    "modulation_attention": modulation_attention_sdpa,
    "pointwise_conv_bn": pointwise_conv_bn_folded,
    "token_hyper": token_hyper_hardsigmoid,
}

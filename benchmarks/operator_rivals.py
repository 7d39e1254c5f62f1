"""Other ways to write the operators in PyTorch, faster than the definitions at some shapes."""

import torch
from torch.nn import functional as F

from mfkernels.operators.dynamic_conv2d import library
from mfkernels.operators.dynamic_conv2d.reference import add_biases
from mfkernels.operators.former_block.library import former_block_by_library


class Unfit(Exception):
    """This way is none for such arguments."""


def dynamic_conv2d_by_library(x, weight, basis, attention, bias, basis_bias, *settings):
    """Apply products of matrices, or one convolution whose groups are the samples."""
    stride, padding, dilation, groups, scale = settings
    batch, _, height, width = x.shape
    if weight.shape[2:].numel() == 1 and max(stride) == 1 and max(padding) == 0:
        return library.dynamic_conv2d_by_library(x, weight, basis, attention, bias, basis_bias, groups, scale)
    mixed = torch.addmm(weight.flatten(), attention, basis.flatten(1), alpha=scale)
    mixed = mixed.view(-1, *weight.shape[1:])
    y = F.conv2d(x.reshape(1, -1, height, width), mixed, None, stride, padding, dilation, batch * groups)
    return add_biases(y.view(batch, -1, *y.shape[2:]), attention, bias, basis_bias)


def dynamic_conv2d_by_sample(x, weight, basis, attention, bias, basis_bias, *settings):
    """Apply a convolution for each sample."""
    *settings, scale = settings
    mixed = torch.addmm(weight.flatten(), attention, basis.flatten(1), alpha=scale)
    mixed = mixed.view(-1, *weight.shape)
    y = torch.cat([F.conv2d(x[i : i + 1], mixed[i], None, *settings) for i in range(x.shape[0])])
    return add_biases(y, attention, bias, basis_bias)


def dynamic_relu_by_maximum(x, slopes, intercepts=None, attention=None):
    """Of two functions, by sample."""
    if attention is not None or slopes.shape[1] != 2:
        raise Unfit
    first, second = slopes[..., None, None].unbind(1)
    if intercepts is None:
        return torch.maximum(x * first, x * second)
    one, other = intercepts[..., None, None].unbind(1)
    return torch.maximum(torch.addcmul(one, x, first), torch.addcmul(other, x, second))


def global_response_norm_addcmul(x, gamma, beta, mean="channels", eps=1e-6):
    """One factor for a channel."""
    norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    means = norms.mean(dim=1, keepdim=True) if mean == "channels" else norms
    factor = torch.addcdiv(torch.ones_like(norms), gamma.view(-1, 1, 1) * norms, means + eps)
    return torch.addcmul(beta.view(-1, 1, 1), x, factor)


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
    """PyTorch's own layer, and measured statistics; given ones by two factors."""
    if mean is None:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        factor = weight * (variance + eps).rsqrt()
        y = x * factor.view(-1, 1, 1) + (bias - mean * factor).view(-1, 1, 1)
    return F.gelu(y) if activation == "gelu" else y, mean, variance


def pointwise_conv_bn_folded(x, weight, gamma, beta, mean, variance, eps=1e-5, activation="none"):
    """Fold the norm into the convolution's weights.

    The gradient of gamma is less exact than the definition's.
    """
    factor = gamma * (variance + eps).rsqrt()
    y = F.conv2d(x, weight * factor.view(-1, 1, 1, 1), beta - mean * factor)
    return F.gelu(y) if activation == "gelu" else y


def pointwise_conv_bn_by_factors(x, weight, gamma, beta, mean, variance, eps=1e-5, activation="none"):
    return batch_norm_by_library(F.conv2d(x, weight), gamma, beta, mean, variance, eps, activation)[0]


RIVALS = {
    "batch_norm": (batch_norm_by_library,),
    "dynamic_conv2d": (dynamic_conv2d_by_library, dynamic_conv2d_by_sample),
    "dynamic_relu": (dynamic_relu_by_maximum,),
    "former_block": (former_block_by_library,),
    "former_to_mobile_attention": (former_to_mobile_attention_sdpa,),
    "global_response_norm": (global_response_norm_addcmul,),
    "mobile_to_former_attention": (mobile_to_former_attention_sdpa,),
    "modulation_attention": (modulation_attention_sdpa,),
    "pointwise_conv_bn": (pointwise_conv_bn_folded, pointwise_conv_bn_by_factors),
    "token_hyper": (token_hyper_hardsigmoid,),
}

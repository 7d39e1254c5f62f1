from typing import Any

from torch import Tensor
from torch.nn import functional as F


def former_block_by_library(tokens: Tensor, *arguments: Any) -> Tensor:
    """`mfkernels.ops.former_block` by PyTorch's own operators: of many tokens, products faster than ours."""
    *parameters, num_heads, form, eps = arguments
    qkv_weight, qkv_bias, proj_weight, proj_bias, *norm1 = parameters[:6]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, *norm2 = parameters[6:]
    shape = tokens.shape

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def feed_forward(x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(shape[0], shape[1], num_heads, shape[2] // num_heads).transpose(1, 2)

    standard = form == "standard"
    q = F.linear(norm(tokens, *norm1) if standard else tokens, qkv_weight, qkv_bias)
    q, k, v = q.chunk(3, 2) if standard else (q, tokens, tokens)
    mixed = F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v))
    z = tokens + F.linear(mixed.transpose(1, 2).reshape(shape), proj_weight, proj_bias)
    if standard:
        return z + feed_forward(norm(z, *norm2))
    z = norm(z, *norm1)
    return z if fc1_weight is None else norm(z + feed_forward(z), *norm2)

"""The operators. Each is also registered as `torch.ops.mfkernels.<same name>`."""

from .operators.batch_norm import batch_norm
from .operators.dynamic_conv2d import dynamic_conv2d
from .operators.dynamic_relu import dynamic_relu
from .operators.former_block import former_block
from .operators.former_to_mobile_attention import former_to_mobile_attention
from .operators.global_response_norm import global_response_norm
from .operators.mobile_to_former_attention import mobile_to_former_attention
from .operators.modulation_attention import modulation_attention
from .operators.pointwise_conv_bn import pointwise_conv_bn
from .operators.token_hyper import token_hyper

__all__ = [
    "batch_norm",
    "dynamic_conv2d",
    "dynamic_relu",
    "former_block",
    "former_to_mobile_attention",
    "global_response_norm",
    "mobile_to_former_attention",
    "modulation_attention",
    "pointwise_conv_bn",
    "token_hyper",
]

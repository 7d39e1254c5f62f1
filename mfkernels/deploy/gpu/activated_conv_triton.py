from ...operators.dynamic_conv2d.triton import activated as dynamic_conv
from ...operators.global_response_norm.triton import activated as response_gelu

__all__ = ["dynamic_conv", "response_gelu"]

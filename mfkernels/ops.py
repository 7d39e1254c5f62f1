"""The operators. Each is also registered as `torch.ops.mfkernels.<same name>`."""

from .operators.dynamic_relu import dynamic_relu
from .operators.former_to_mobile_attention import former_to_mobile_attention
from .operators.mobile_to_former_attention import mobile_to_former_attention

__all__ = ["dynamic_relu", "former_to_mobile_attention", "mobile_to_former_attention"]

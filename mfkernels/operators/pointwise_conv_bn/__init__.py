from .operator import pointwise_conv_bn
from .reference import pointwise_conv_bn_reference

__all__ = ["pointwise_conv_bn", "pointwise_conv_bn_reference"]

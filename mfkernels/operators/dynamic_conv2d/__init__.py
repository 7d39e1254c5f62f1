from .operator import dynamic_conv2d
from .reference import dynamic_conv2d_reference

__all__ = ["dynamic_conv2d", "dynamic_conv2d_reference"]

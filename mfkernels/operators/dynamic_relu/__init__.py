from .operator import dynamic_relu
from .reference import dynamic_relu_reference

__all__ = ["dynamic_relu", "dynamic_relu_reference"]

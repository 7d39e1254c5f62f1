from .operator import former_to_mobile_attention
from .reference import former_to_mobile_attention_reference

__all__ = ["former_to_mobile_attention", "former_to_mobile_attention_reference"]

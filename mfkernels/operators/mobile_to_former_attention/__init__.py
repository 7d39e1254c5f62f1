from .operator import mobile_to_former_attention
from .reference import mobile_to_former_attention_reference

__all__ = ["mobile_to_former_attention", "mobile_to_former_attention_reference"]

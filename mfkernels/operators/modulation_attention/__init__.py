from .operator import modulation_attention
from .reference import modulation_attention_reference

__all__ = ["modulation_attention", "modulation_attention_reference"]

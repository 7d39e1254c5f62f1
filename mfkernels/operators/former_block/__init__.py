from .operator import former_block
from .reference import former_block_reference

__all__ = ["former_block", "former_block_reference"]

from .operator import batch_norm
from .reference import batch_norm_reference

__all__ = ["batch_norm", "batch_norm_reference"]

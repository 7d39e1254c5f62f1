from .operator import global_response_norm
from .reference import global_response_norm_reference

__all__ = ["global_response_norm", "global_response_norm_reference"]

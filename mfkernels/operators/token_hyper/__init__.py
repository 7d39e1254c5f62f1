from .operator import token_hyper
from .reference import token_hyper_reference

__all__ = ["token_hyper", "token_hyper_reference"]

"""Fused kernels for Mobile-Former, Dynamic Mobile-Former and iFormer."""

from . import native  # first: it loads the C++ operators that `ops` describes to PyTorch

# isort: split
from . import models, nn, ops
from .acceleration import accelerate, restore
from .attention import AttentionMap, attention_maps
from .backends import current_backend, use_backend
from .deploy import deploy
from .export import decompositions
from .streams import use_streams
from .verification import verify

__all__ = [
    "AttentionMap",
    "accelerate",
    "attention_maps",
    "current_backend",
    "decompositions",
    "deploy",
    "models",
    "native",
    "nn",
    "ops",
    "restore",
    "use_backend",
    "use_streams",
    "verify",
]
__version__ = "0.1.0"

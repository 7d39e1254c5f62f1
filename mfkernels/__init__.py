"""Fused kernels for Mobile-Former, Dynamic Mobile-Former and iFormer."""

from . import native  # first: it loads the C++ operators that `ops` describes to PyTorch

# isort: split
from . import models, nn, ops
from .backends import current_backend, use_backend
from .deploy import deploy

__all__ = ["current_backend", "deploy", "models", "native", "nn", "ops", "use_backend"]
__version__ = "0.1.0"

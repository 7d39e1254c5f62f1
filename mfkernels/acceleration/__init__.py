"""Other people's networks, made faster in place."""

from .accelerate import Left, Replaced, Report, Rule, accelerate, restore
from .adopt import Unfit, adopt

__all__ = ["Left", "Replaced", "Report", "Rule", "Unfit", "accelerate", "adopt", "restore"]

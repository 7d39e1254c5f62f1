"""Modules with the released networks' parameter names: drop-in parts of Mobile-Former.

Feature maps are (B, C, H, W). Tokens are (T, B, d): the token first, as in the released code.
"""

from torch.nn import ChannelShuffle

from .classifier_head import ClassifierHead
from .drop_path import DropPath
from .dynamic_relu import DynamicReLU, HyperNetwork
from .former import Former
from .former_to_mobile_attention import FormerToMobile
from .lite_bottleneck import LiteBottleneck
from .mobile_former_block import MobileFormerBlock, MobileFormerDownsample
from .mobile_to_former_attention import MobileToFormer

__all__ = [
    "ChannelShuffle",
    "ClassifierHead",
    "DropPath",
    "DynamicReLU",
    "Former",
    "FormerToMobile",
    "HyperNetwork",
    "LiteBottleneck",
    "MobileFormerBlock",
    "MobileFormerDownsample",
    "MobileToFormer",
]

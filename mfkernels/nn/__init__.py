"""Modules with the released networks' parameter names: drop-in parts of Mobile-Former, Dynamic Mobile-Former
(DMF) and iFormer.

Feature maps are (B, C, H, W). Tokens are (T, B, d) in Mobile-Former, the token first, as in the released
code; in DMF they are (B, T, d).
"""

from torch.nn import ChannelShuffle

from .classifier_head import ClassifierHead
from .conv_bn import ConvBN
from .drop_path import DropPath
from .dynamic_conv2d import DynamicResidualConv2d
from .dynamic_relu import DynamicReLU
from .former_block import Former
from .former_to_mobile_attention import FormerToMobile
from .global_response_norm import GlobalResponseNorm
from .inverted_residual_ffn import InvertedResidualFFN
from .kernel_attention import KernelAttention
from .lite_bottleneck import LiteBottleneck
from .mobile_former_block import MobileFormerBlock, MobileFormerDownsample
from .mobile_to_former_attention import MobileToFormer
from .modulation_attention import SingleHeadModulationAttention
from .token_hyper import HyperNetwork

__all__ = [
    "ChannelShuffle",
    "ClassifierHead",
    "ConvBN",
    "DropPath",
    "DynamicReLU",
    "DynamicResidualConv2d",
    "Former",
    "FormerToMobile",
    "GlobalResponseNorm",
    "HyperNetwork",
    "InvertedResidualFFN",
    "KernelAttention",
    "LiteBottleneck",
    "MobileFormerBlock",
    "MobileFormerDownsample",
    "MobileToFormer",
    "SingleHeadModulationAttention",
]

"""Modules with the released networks' parameter names.

They are drop-in parts of Mobile-Former, Dynamic Mobile-Former (DMF) and iFormer.

Feature maps are (B, C, H, W). Tokens are (T, B, d) in Mobile-Former, the token first, as in the released
code; in DMF they are (B, T, d).
"""

from torch.nn import ChannelShuffle

from .adapt_position import AdaptPosition
from .attention2d import Attention2d, PreNormModulationAttention
from .batch_norm import normalize
from .classifier_head import ClassifierHead
from .conv_bn import BNConv, BNLinear, ConvBN
from .detection_block import DetectionBlock
from .dmf_block import DMFBlock, DynamicMobile
from .dmf_stem_head import DMFHead, DMFStem
from .dmf_tokens import DMFFormer, DMFFormerToMobile, DMFMobileToFormer
from .drop_path import DropPath
from .dynamic_conv2d import DynamicResidualConv2d
from .dynamic_relu import DynamicReLU
from .encoder_layer import EncoderLayer
from .former_block import Former
from .former_to_mobile_attention import FormerToMobile
from .fused_inverted_bottleneck import FusedInvertedBottleneck
from .fused_sequential import FusedSequential
from .global_response_norm import GlobalResponseNorm
from .iformer_block import ConvBlock, FFN2d, IFormerBlock, IFormerStage, RepCPE, SHMABlock
from .iformer_classifier import IFormerClassifier
from .inverted_bottleneck import InvertedBottleneck
from .inverted_residual_ffn import InvertedResidualFFN
from .kernel_attention import KernelAttention
from .layer_norm2d import LayerNorm2d
from .lite_bottleneck import LiteBottleneck
from .mobile_former_block import MobileFormerBlock, MobileFormerDownsample
from .mobile_to_former_attention import MobileToFormer
from .modulation_attention import SingleHeadModulationAttention
from .padding import Padding
from .pointwise_conv_bn import conv_norm
from .reparameterized_depthwise import ReparameterizedDepthwise
from .residual import Residual
from .token_hyper import HyperNetwork
from .up_conv import UpConv

__all__ = [
    "AdaptPosition",
    "Attention2d",
    "BNConv",
    "BNLinear",
    "ChannelShuffle",
    "ClassifierHead",
    "ConvBN",
    "ConvBlock",
    "DMFBlock",
    "DMFFormer",
    "DMFFormerToMobile",
    "DMFHead",
    "DMFMobileToFormer",
    "DMFStem",
    "DetectionBlock",
    "DropPath",
    "DynamicMobile",
    "DynamicReLU",
    "DynamicResidualConv2d",
    "EncoderLayer",
    "FFN2d",
    "Former",
    "FormerToMobile",
    "FusedInvertedBottleneck",
    "FusedSequential",
    "GlobalResponseNorm",
    "HyperNetwork",
    "IFormerBlock",
    "IFormerClassifier",
    "IFormerStage",
    "InvertedBottleneck",
    "InvertedResidualFFN",
    "KernelAttention",
    "LayerNorm2d",
    "LiteBottleneck",
    "MobileFormerBlock",
    "MobileFormerDownsample",
    "MobileToFormer",
    "Padding",
    "PreNormModulationAttention",
    "RepCPE",
    "ReparameterizedDepthwise",
    "Residual",
    "SHMABlock",
    "SingleHeadModulationAttention",
    "UpConv",
    "conv_norm",
    "normalize",
]

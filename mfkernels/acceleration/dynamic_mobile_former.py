"""The classes of the released DMF (dmf_final.py)."""

from typing import Any

from ..nn import DMFFormer, DMFMobileToFormer, DynamicResidualConv2d, GlobalResponseNorm
from .adopt import Unfit, adopt
from .settings import Found, drop_path_rate, random_inputs


def dynamic_conv(old: Any) -> Found:
    if type(old).__name__ != "CondConv":
        return None
    if old.bias is not None or old.dilation != 1 or old.padding != old.kernel_size // 2 or old.stride != 1:
        raise Unfit("it has a bias, a dilation, a stride or another padding, which no released network has")
    kernels, outputs, _, size, _ = old.weight.shape
    attention = old.Kernel_Attention
    channels, width = old.in_channels, attention.net1.out_channels
    new = DynamicResidualConv2d(
        channels, outputs, size, token_dim=width, num_kernels=kernels, groups=old.groups
    )
    # As it is: its temperature is set from outside.
    adopt(new, old, whole=("Kernel_Attention",))
    return new, lambda: random_inputs((2, channels, 5, 6), (2, width))


def mobile_to_former(old: Any) -> Found:
    if type(old).__name__ != "Mobile2Former":
        return None
    if old.attn_drop.p > 0:
        raise Unfit("it has a dropout of the attention's weights, which no released network has")
    channels, width = old.fc.in_features, old.fc.out_features
    new = DMFMobileToFormer(
        channels, width, num_heads=old.num_heads, dropout=old.drop.p, drop_path=drop_path_rate(old.drop_path)
    )
    return adopt(new, old), lambda: random_inputs((2, channels, 5, 6), (2, 3, width))


def former(old: Any) -> Found:
    if type(old).__name__ != "Former" or not hasattr(old, "token_attention"):
        return None
    attention, rates = old.token_attention, [drop_path_rate(old.drop_path1), drop_path_rate(old.drop_path2)]
    dropouts = {attention.proj_drop.p, old.mlp.dropout.p}
    if attention.attn_drop.p > 0 or len(dropouts) > 1 or rates[0] != rates[1]:
        raise Unfit("its dropouts or drop paths differ, as in no released network")
    width = old.mlp.fc1.in_features
    new = DMFFormer(width, dropout=dropouts.pop(), drop_path=rates[0])
    return adopt(new, old), lambda: random_inputs((2, 3, width))


def global_response_norm(old: Any) -> Found:
    if type(old).__name__ != "GRN":
        return None
    channels = old.gamma.shape[1]
    # ConvNeXt V2 has a class of this name, too, for maps with the channels last: the shapes differ.
    return adopt(GlobalResponseNorm(channels), old), lambda: random_inputs((2, channels, 5, 6))


RULES = (dynamic_conv, mobile_to_former, former, global_response_norm)

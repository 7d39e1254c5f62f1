"""The classes of the released DMF (dmf_final.py)."""

from typing import Any

from ..models.dynamic_mobile_former import DynamicMobileFormer
from ..nn import (
    DMFFormer,
    DMFMobileToFormer,
    DMFStem,
    DynamicMobile,
    DynamicResidualConv2d,
    GlobalResponseNorm,
    InvertedBottleneck,
    InvertedResidualFFN,
    KernelAttention,
)
from .adopt import Unfit, adopt
from .settings import Found, drop_path_rate, random_inputs


def dynamic_conv(old: Any) -> Found:
    if type(old).__name__ != "CondConv":
        return None
    _check_settings(old)
    kernels, outputs, _, size, _ = old.weight.shape
    attention = old.Kernel_Attention
    channels, width = old.in_channels, attention.net1.out_channels
    new = DynamicResidualConv2d(
        channels, outputs, size, token_dim=width, num_kernels=kernels, groups=old.groups
    )
    # As it is: its temperature is set from outside.
    adopt(new, old, whole=("Kernel_Attention",))
    return new, lambda: random_inputs((2, channels, 5, 6), (2, width))


def _check_settings(conv: Any) -> None:
    if (
        conv.bias is not None
        or conv.dilation != 1
        or conv.padding != conv.kernel_size // 2
        or conv.stride != 1
    ):
        raise Unfit("it has a bias, a dilation, a stride or another padding, which no released network has")


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


def stem(old: Any) -> Found:
    if type(old).__name__ != "Stem" or not hasattr(old, "bn"):
        return None
    conv = old.conv
    new = DMFStem(conv.in_channels, conv.out_channels, conv.kernel_size[0])
    return adopt(new, old), lambda: random_inputs((2, conv.in_channels, 12, 13))


def bottleneck(old: Any) -> Found:
    if type(old).__name__ != "BottleNeck" or not hasattr(old, "pw_conv1"):
        return None
    first, middle, last = old.pw_conv1, old.dw_conv, old.pw_conv2
    new: Any
    if hasattr(old, "grn"):
        new = InvertedResidualFFN(first.in_channels, first.out_channels)
    else:
        new = InvertedBottleneck(
            first.in_channels,
            first.out_channels,
            last.out_channels,
            stride=middle.stride[0],
            kernel_size=middle.kernel_size[0],
            groups=first.groups,
        )
    return adopt(new, old), lambda: random_inputs((2, first.in_channels, 5, 6))


def dynamic_mobile(old: Any) -> Found:
    if type(old).__name__ != "DynamicMobile":
        return None
    convs = dict(pw_conv1=old.pw_conv1, dw_conv=old.dw_conv, pw_conv2=old.pw_conv2)
    dynamic = [conv for conv in convs.values() if type(conv).__name__ == "CondConv"]
    if not dynamic:
        raise Unfit("none of its convolutions is dynamic")
    for conv in dynamic:
        _check_settings(conv)
    channels, width = old.pw_conv1.in_channels, dynamic[0].Kernel_Attention.net1.out_channels
    new = DynamicMobile(
        channels,
        old.bn1.num_features,
        old.bn3.num_features,
        token_dim=width,
        stride=2 if hasattr(old, "downsample") else 1,
        kernel_size=old.dw_conv.weight.shape[-1],
        groups=old.pw_conv1.groups,
        pointwise_kernels=_kernels(old.pw_conv1),
        depthwise_kernels=_kernels(old.dw_conv),
    )
    # As it is: its temperature is set from outside.
    adopt(new, old, whole=[f"{conv}.Kernel_Attention" for conv in convs])
    return new, lambda: random_inputs((2, channels, 5, 6), (2, width))


def _kernels(conv: Any) -> int:
    return conv.weight.shape[0] if conv.weight.dim() == 5 else 1


def network(old: Any) -> DynamicMobileFormer | None:
    """Return the released network `old`, as it was published, as one of ours with the same layers.

    Return None if it is something else. Whether both compute the same is left to the caller to compare.
    """
    if type(old).__name__ != "DynamicMobileFormer":
        return None

    rows, ratios = [], []
    for block in old.blocks:
        mobile, heads = block.dynamic_mobile, block.mobile2former.num_heads
        hidden, outputs = mobile.bn1.num_features, mobile.bn3.num_features
        stride = 2 if hasattr(mobile, "downsample") else 1
        rows.append((hidden, outputs, stride, heads, _kernels(mobile.pw_conv1), _kernels(mobile.dw_conv)))
        ratios.append(block.ffn.bn1.num_features / outputs)
    lite, head = old.lite_bottleneck, old.head
    new = DynamicMobileFormer(
        rows,
        stem_channels=old.stem.conv.out_channels,
        lite_channels=(lite.bn1.num_features, lite.bn3.num_features),
        features=old.bn.num_features,
        head_features=head.fc1.out_features,
        num_classes=head.fc2.out_features,
        in_channels=old.stem.conv.in_channels,
        token_num=old.tokens.shape[1],
        token_dim=old.tokens.shape[2],
        groups=old.blocks[0].dynamic_mobile.pw_conv1.groups,
        # Of all blocks, whose hidden channels are rounded down.
        ffn_ratio=max(ratios) + 1e-9,
    )
    adopt(new, old)
    for path, module in new.named_modules():
        if isinstance(module, KernelAttention):
            module.temperature = old.get_submodule(path).temperature
    return new.train(old.training)


RULES = (dynamic_mobile, dynamic_conv, mobile_to_former, former, bottleneck, global_response_norm, stem)

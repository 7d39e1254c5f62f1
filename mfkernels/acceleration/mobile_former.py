"""The classes of the released Mobile-Former (dna_blocks.py)."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from ..models.mobile_former import MobileFormer
from ..nn import (
    ClassifierHead,
    Former,
    FormerToMobile,
    LiteBottleneck,
    MobileFormerBlock,
    MobileFormerDownsample,
    MobileToFormer,
)
from .adopt import Unfit, adopt
from .settings import Found, drop_path_rate, random_inputs


def _size(module: Any) -> tuple[int, int]:
    """Of a map that the module takes: position mixing fixes the number of pixels."""
    return (1, module.mlp.in_features) if "mlp" in module.block else (5, 6)


def _bridge_options(old: Any) -> dict[str, Any]:
    return dict(
        num_heads=old.num_heads,
        gate=old.use_dynamic,
        mixing=old.block,
        token_num=old.token_num,
        local_projection=not old.remove_proj_local,
        drop_path=drop_path_rate(old.drop_path),
    )


def _pair(channels: int, size: tuple[int, int], tokens: int, width: int) -> Callable[[], tuple]:
    return lambda: (random_inputs((2, channels, *size), (tokens, 2, width)),)


def local_to_global(old: Any) -> Found:
    if type(old).__name__ != "Local2Global":
        return None
    channels, width = old.proj.in_features, old.proj.out_features
    positions = old.mlp.in_features if "mlp" in old.block else None
    new = MobileToFormer(channels, width, positions=positions, **_bridge_options(old))
    return adopt(new, old), _pair(channels, _size(old), old.token_num, width)


def global_to_local(old: Any) -> Found:
    if type(old).__name__ != "Global2Local":
        return None
    channels, width = old.proj.out_features, old.proj.in_features
    size = (1, old.mlp.out_features) if "mlp" in old.block else (5, 6)
    new = FormerToMobile(channels, width, positions=size[0] * size[1], **_bridge_options(old))
    return adopt(new, old), _pair(channels, size, old.token_num, width)


def _former_options(old: Any) -> dict[str, Any]:
    mlp = old.token_mlp[0] if "mlp" in old.block else None
    expansion = 4 if mlp is None else mlp.out_features // mlp.in_features
    return dict(ffn=old.use_ffn, mlp_expansion=expansion)


def global_block(old: Any) -> Found:
    if type(old).__name__ != "GlobalBlock":
        return None
    width, rate = old.channel_mlp.in_features, drop_path_rate(old.drop_path)
    options = dict(num_heads=old.num_heads, gate=old.use_dynamic, mixing=old.block, token_num=old.token_num)
    new = Former(width, drop_path=rate, **options, **_former_options(old))
    return adopt(new, old), lambda: random_inputs((old.token_num, 2, width))


def block(old: Any) -> Found:
    kind = type(old).__name__
    if kind not in ("DnaBlock", "DnaBlock3") or old.use_conv_alone:  # plain convolutions alone
        return None
    first, bridge, former, scatter = old.conv1[0], old.local_global, old.global_block, old.global_local
    if not isinstance(first, nn.Conv2d) or first.kernel_size[0] != first.kernel_size[1]:
        raise Unfit("its depthwise convolutions are an ablation")
    inputs, hidden = first.in_channels, first.out_channels
    downsample = kind == "DnaBlock3"
    second = old.conv3[0] if downsample else old.conv2[0]
    last = old.conv4[0] if downsample else old.conv3[0]
    outputs, width = last.out_channels, bridge.proj.out_features
    hypers = [m.hyper for name, m in old.named_children() if name.startswith("hyper") and hasattr(m, "hyper")]
    size, positions = _size(bridge), None
    if "mlp" in bridge.block:
        positions = size[1]
        if old.stride != 1:
            raise Unfit("position mixing with a stride")
    options = dict(
        token_dim=width,
        token_num=bridge.token_num,
        token_id=old.hyper_token_id,
        se_flag=tuple(old.se_flag),
        hyper_reduction=width // hypers[0][0].out_features if hypers else 4,
        groups=last.groups,
        num_heads=bridge.num_heads,
        gates=(bridge.use_dynamic, former.use_dynamic, scatter.use_dynamic),
        mixing=bridge.block,
        positions=positions,
        local_projection=not bridge.remove_proj_local,
        **_former_options(former),
    )
    new: Any
    if downsample:
        kernels = (first.kernel_size[0], second.kernel_size[0])
        expansion = (hidden / inputs, second.out_channels / outputs)
        new = MobileFormerDownsample(
            inputs, outputs, old.stride, expansion=expansion, kernel_size=kernels, **options
        )
    else:
        options |= dict(expansion=hidden / inputs, kernel_size=(second.kernel_size[0],) * 2)
        new = MobileFormerBlock(inputs, outputs, old.stride, before_skip=old.gbr_before_skip, **options)
    adopt(new, old)
    for name in ("", "local_global", "global_block", "global_local"):
        ours, theirs = new.get_submodule(name), old.get_submodule(name)
        ours.drop_path.rate = drop_path_rate(theirs.drop_path)
    return new, _pair(inputs, size, bridge.token_num, width)


def lite_block(old: Any) -> Found:
    if type(old).__name__ not in ("DnaBlock", "DnaBlock3") or not old.use_conv_alone:
        return None
    convs = [layer for layer in old.conv if isinstance(layer, nn.Conv2d)]
    if len(convs) != 2:
        raise Unfit("its depthwise convolution is an ablation")
    inputs, hidden, outputs = convs[0].in_channels, convs[0].out_channels, convs[1].out_channels
    new = LiteBottleneck(inputs, outputs, old.stride, expansion=hidden // inputs, groups=convs[1].groups)
    return adopt(new, old), lambda: (random_inputs((2, inputs, 5, 6), (3, 2, 8)),)


def classifier(old: Any) -> Found:
    if type(old).__name__ != "MergeClassifier":
        return None
    conv, linear, last = old.conv[1], old.fc[0], old.classifier[1]
    dynamic = old.last_act == "dyrelu"
    count = old.cls_token_num
    joined = linear.in_features - conv.out_channels
    width = old.hyper.hyper[0].in_features if dynamic else joined // max(count, 1) if count >= 0 else 1
    new = ClassifierHead(
        conv.in_channels,
        last.out_features,
        features=linear.out_features,
        token_dim=width,
        expansion=conv.out_channels // conv.in_channels,
        groups=conv.groups,
        class_tokens=count,
        activation="dynamic_relu" if dynamic else "relu6",
        token_id=old.hyper.sel_token_id if dynamic else 0,
        hyper_reduction=width // old.hyper.hyper[0].out_features if dynamic else 4,
        dropout=old.classifier[0].p,
        drop_branch=(old.drop_branch[0], old.drop_branch[1]),
    )
    return adopt(new, old), _pair(conv.in_channels, (3, 4), max(count, 1), width)


def network(old: Any) -> MobileFormer | None:
    """Return the released network `old`, as it was published, as one of ours with the same layers.

    Return None if it is something else. Whether both compute the same is left to the caller to compare.
    """
    if type(old).__name__ != "MobileFormer" or len(old.stem) != 3:
        return None
    conv = old.stem[0]
    new = MobileFormer(
        [], num_classes=1, in_channels=conv.in_channels, stem_channels=conv.out_channels, features=1
    )
    new.tokens = old.tokens
    adopt(new.stem, old.stem)
    parts = []
    for part in (*old.features, old.local_global, old.classifier):
        rules = (block, lite_block, local_to_global, classifier)
        found = next((found for rule in rules if (found := rule(part)) is not None), None)
        if found is None:
            raise Unfit(f"it has a {type(part).__name__}")
        parts.append(found[0])
    *blocks, bridge, head = parts
    new.features = nn.Sequential(*blocks)
    new.local_global, new.classifier = cast(MobileToFormer, bridge), cast(ClassifierHead, head)
    if list(new.state_dict()) != list(old.state_dict()):
        raise Unfit("it has other parts than the released network")
    return new.train(old.training)


RULES = (block, local_to_global, global_block, global_to_local)

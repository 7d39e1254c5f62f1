"""The classes of the released iFormer (iformer.py)."""

from typing import Any

from ..models.iformer import IFormer
from ..nn import ConvBN, FusedInvertedBottleneck, SingleHeadModulationAttention
from .adopt import Unfit, adopt
from .settings import Found, random_inputs


def modulation_attention(old: Any) -> Found:
    if type(old).__name__ != "SHMA":
        return None
    if old.attn_drop.p > 0 or old.kv_stride != 1 or old.q.c.kernel_size != (1, 1):
        raise Unfit("it has a dropout, a stride or large kernels, which no released network has")
    channels, depth = old.q.c.in_channels, old.q.c.out_channels
    new = SingleHeadModulationAttention(
        channels,
        reduction=channels // depth,
        ratio=old.proj.c.in_channels / channels,
        num_heads=1 if old.fused_attn else old.num_heads,
        window_size=old.window_size or None,
    )
    return adopt(new, old), lambda: random_inputs((2, channels, 5, 6))


def conv_bn(old: Any) -> Found:
    if type(old).__name__ != "Conv2d_BN":
        return None
    c = old.c
    new = ConvBN(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0], c.groups)
    return adopt(new, old), lambda: random_inputs((2, c.in_channels, 12, 13))


def edge_residual(old: Any) -> Found:
    if type(old).__name__ != "EdgeResidual":
        return None
    first, last = old.conv_exp_bn1.c, old.conv_pwl_bn2.c
    new = FusedInvertedBottleneck(
        first.in_channels,
        last.out_channels,
        first.kernel_size[0],
        first.stride[0],
        expansion=first.out_channels // first.in_channels,
    )
    return adopt(new, old), lambda: random_inputs((2, first.in_channels, 12, 13))


def network(old: Any) -> IFormer | None:
    """Return the released network `old`, as it was published, as one of ours with the same layers.

    Return None if it is something else. Whether both compute the same is left to the caller to compare.
    """
    if type(old).__name__ != "iFormer" or not old.use_bn:
        return None
    first, *halvings = old.downsample_layers
    edge = type(first[2]).__name__ == "EdgeResidual"
    blocks = [[_block_string(block.block) for block in stage] for stage in old.stages]
    residuals = [m for m in old.modules() if type(m).__name__ == "Residual"]
    new = IFormer(
        [len(stage) for stage in blocks],
        [first[0].c.out_channels * 2, *(layers[0].c.out_channels for layers in halvings)],
        [block for stage in blocks for block in stage],
        num_classes=old.classifier.classifier.l.out_features,
        in_channels=first[0].c.in_channels,
        kernels=[first[0].c.kernel_size[0], *(layers[0].c.kernel_size[0] for layers in halvings)],
        stem="FusedIB" if edge else "conv_stem",
        distillation=old.classifier.distillation,
        last_projection=old.last_proj,
        layer_scale=1.0 if any(residual.gamma is not None for residual in residuals) else 0.0,
    )
    return adopt(new, old).train(old.training)  # type: ignore[return-value]


def _block_string(block: Any) -> str:
    kind = type(block).__name__
    if kind == "RepCPE":
        return f"RepCPE_k{block.cpe.m.c.kernel_size[0]}"
    if kind == "FFN2d":
        first = block.channel_mixer.m[0].c
        return f"FFN2d_r{first.out_channels // first.in_channels}"
    if kind == "ConvBlock":
        depthwise, first = block.token_channel_mixer.m[0], block.token_channel_mixer.m[1].c
        ratio = first.out_channels // first.in_channels
        if hasattr(depthwise, "conv1"):
            return f"ConvBlock_k7_r{ratio}_reparam1"
        return f"ConvBlock_k{depthwise.c.kernel_size[0]}_r{ratio}"
    if kind != "SHMABlock":
        raise Unfit(f"it has a {kind}")
    mixer = block.token_channel_mixer.m
    channels = mixer.q.c.in_channels
    words = [f"r{mixer.proj.c.in_channels // channels}", f"hdrr{channels // mixer.q.c.out_channels}"]
    words += [f"nh{1 if mixer.fused_attn else mixer.num_heads}"]
    if block.window_split or block.window_reverse:
        marks = f"wsp{int(block.window_split)}_wre{int(block.window_reverse)}"
        words += [f"ws{block.window_size}", marks]
    elif mixer.window_size:
        words.append(f"ws{mixer.window_size}")
    return "_".join(["SHMABlock", *words])


RULES = (modulation_attention, edge_residual, conv_bn)

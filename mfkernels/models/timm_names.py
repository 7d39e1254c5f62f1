"""Translate timm's names of the parts of an iFormer."""

import re

_RENAMED = (
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.2\.conv_exp_bn1\.", "stem.conv2."),
    (r"^downsample_layers\.0\.2\.conv_pwl_bn2\.", "stem.conv3."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.block\.", r"stages.\1.blocks.\2."),
    (r"\.(?:token_)?channel_mixer\.", ".mixer."),
    (r"\.m\.", ".module."),
    (r"\.cpe\.(weight|bias)$", r".\1"),  # fused
    (r"^classifier\.classifier(_dist)?\.", r"head.head\1."),
    (r"^classifier\.", "head."),  # fused
)


def timm_name(name: str) -> str:
    """Return the name that timm's iFormer has for a parameter or buffer of an `IFormer` of ours."""
    for ours, theirs in _RENAMED:
        name = re.sub(ours, theirs, name)
    return name

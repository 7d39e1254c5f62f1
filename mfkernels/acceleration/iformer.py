"""The classes of the released iFormer (iformer.py)."""

from typing import Any

from ..nn import SingleHeadModulationAttention
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
    # As they are: iFormer folds its convolutions and norms itself.
    adopt(new, old, whole=("q", "k", "v_gate", "proj"))
    return new, lambda: random_inputs((2, channels, 5, 6))


RULES = (modulation_attention,)

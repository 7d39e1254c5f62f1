"""The classes of timm's iFormer (timm/models/iformer.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..models.features import FeaturePyramid
from ..models.iformer import IFormer
from ..models.timm_names import timm_name
from ..nn import ConvBN, FusedSequential, SingleHeadModulationAttention
from .adopt import Unfit, adopt
from .settings import Found, random_inputs

_STEM = ["conv1", "act1", "conv2", "act2", "conv3"]


def modulation_attention(old: Any) -> Found:
    if type(old).__name__ != "SHMA" or not hasattr(old, "gate_act"):
        return None
    if old.attn_drop.p > 0 or type(old.gate_act) is not nn.Sigmoid:
        raise Unfit("it has a dropout or another gate, which no network of timm has")
    channels, depth = old.q.c.in_channels, old.q.c.out_channels
    new = SingleHeadModulationAttention(
        channels,
        reduction=channels // depth,
        ratio=old.proj.c.in_channels / channels,
        window_size=old.window_size or None,
    )
    new._modules = {name: new._modules[name] for name in old._modules if name in new._modules}
    return adopt(new, old), lambda: random_inputs((2, channels, 5, 6))


def conv_norm(old: Any) -> Found:
    """Replace a `ConvNorm` of these layers: timm has other classes of this name."""
    if type(old).__name__ != "ConvNorm" or list(old._modules) != ["c", "bn"]:
        return None
    c = old.c
    new = ConvBN(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0], c.groups)
    return adopt(new, old), lambda: random_inputs((2, c.in_channels, 12, 13))


def stem(old: Any) -> Found:
    """Its layers stay what they are: they are visited after it."""
    if type(old).__name__ != "Stem" or list(old._modules) != _STEM:
        return None
    new = FusedSequential()
    new._modules.update(old._modules)
    new.training = old.training
    return new, lambda: random_inputs((2, _conv(old.conv1).in_channels, 12, 13))


def network(old: Any) -> IFormer | FeaturePyramid | None:
    """Return timm's network `old`, or its pyramid (`features_only=True`), as one of ours.

    The parameters are the same. Return None if it is something else. Whether both compute the same is left to
    the caller to compare.
    """
    kind, children = type(old).__name__, old._modules
    if kind == "FeatureListNet" and type(children.get("stem")).__name__ == "Stem":
        stages = [stage for name, stage in children.items() if name.startswith("stages_")]
        state = {name.replace("stages_", "stages."): value for name, value in old.state_dict().items()}
        taken = [list(children).index(name) - 1 for name in old.return_layers]
        return FeaturePyramid(_network(old.stem, stages, None, state), taken).train(old.training)
    if kind != "IFormer" or type(children.get("stem")).__name__ != "Stem":
        return None
    if len(old.stages) != 4:
        raise Unfit(f"it has {len(old.stages)} stages; only four are known")
    if old.global_pool != "avg":
        raise Unfit(f"it has global_pool {old.global_pool!r}; only 'avg' is known")
    return _network(old.stem, list(old.stages), old.head, old.state_dict()).train(old.training)


def _network(stem: Any, stages: list[Any], head: Any, state: dict[str, Tensor]) -> IFormer:
    blocks = [[_block_string(block) for block in stage.blocks] for stage in stages]
    dims = [_conv(stem.conv3).out_channels]
    for stage in stages[1:]:
        halved = not isinstance(stage.downsample, nn.Identity)
        dims.append(_conv(stage.downsample).out_channels if halved else dims[-1])
    missing = 4 - len(stages)
    classes = _classes(head)
    with torch.device("meta"):
        new = IFormer(
            [*(len(stage) for stage in blocks), *[0] * missing],
            [*dims, *dims[-1:] * missing],
            [block for stage in blocks for block in stage],
            num_classes=classes or 1,
            in_channels=_conv(stem.conv1).in_channels,
            kernels=(_conv(stem.conv1).kernel_size[0], 3, 3, 3),
            distillation=hasattr(head, "head_dist") and not isinstance(head.head_dist, nn.Identity),
            layer_scale=1.0 if any(name.endswith(".gamma") for name in state) else 0.0,
        )
    new.stages, new.downsample_layers = new.stages[: len(stages)], new.downsample_layers[: len(stages)]
    new.feature_stages = new.feature_stages[: len(stages)]
    if not classes:
        del new.classifier
    if isinstance(stem.conv1, nn.Conv2d):
        new.eval().fuse()
    ours = {timm_name(name): name for name in new.state_dict()}
    try:
        new.load_state_dict({ours.get(name, name): value for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise Unfit(f"its structure is not that of timm's iFormer: {error}") from error
    if head is not None and not classes:  # the features themselves are the result
        new.classifier = _identity(dims[-1], next(new.parameters()))  # type: ignore[assignment]
    return new


def _classes(head: Any) -> int:
    """Return the number of classes; 0 where there is no head."""
    layer = getattr(head, "head", head)
    layer = getattr(layer, "l", layer)
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _identity(features: int, like: Tensor) -> nn.Linear:
    layer = nn.Linear(features, features, device=like.device, dtype=like.dtype)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(layer: Any) -> nn.Conv2d:
    """Return the convolution of a `ConvNorm`, which `fuse` leaves alone in its place."""
    return layer if isinstance(layer, nn.Conv2d) else layer.c


def _block_string(block: Any) -> str:
    kind = type(block).__name__
    if kind in ("RepCPE", "Conv2d"):
        return f"RepCPE_k{_conv(block if kind == 'Conv2d' else block.cpe.module).kernel_size[0]}"
    if kind not in ("ConvBlock", "FFN", "SHMABlock"):
        raise Unfit(f"it has a {kind}")
    inner = block.mixer.module
    if kind == "SHMABlock":
        channels, depth = _conv(inner.q).in_channels, _conv(inner.q).out_channels
        window = f"_ws{inner.window_size}" if inner.window_size else ""
        return f"SHMABlock_r{_conv(inner.proj).in_channels // channels}_hdrr{channels // depth}_nh1{window}"
    first = _conv(inner[0])
    if kind == "FFN":
        return f"FFN2d_r{first.out_channels // first.in_channels}"
    ratio = _conv(inner[1]).out_channels // first.out_channels
    return f"ConvBlock_k{first.kernel_size[0]}_r{ratio}"


RULES = (modulation_attention, stem, conv_norm)

"""Show what a network looks at: attention of bridges and of iFormer's blocks, and scores of DMF's kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_tensor
from .nn import (
    DMFFormerToMobile,
    DMFMobileToFormer,
    FormerToMobile,
    KernelAttention,
    MobileToFormer,
    Padding,
    SingleHeadModulationAttention,
)
from .nn.iformer_block import split_windows
from .nn.inputs import map_and_tokens

__all__ = ["AttentionMap", "attention_maps"]


class AttentionMap(NamedTuple):
    """The weights of an attention; `kind` says of which, and so the shape of `weights`.

    - "mobile_to_former": (B, heads, T, H, W); the sum over the pixels of each token is 1.
    - "former_to_mobile": (B, heads, T, H, W); the sum over the tokens of each pixel is 1.
    - "pixels": (B, H W, H, W); the sum over the last two axes is 1. The second axis are the pixels that look,
      row by row. An attention in windows has (B windows, N, window, window), windows row by row, the sample
      slowest.
    - "kernels": (B, K), the scores of a dynamic convolution's kernels: sigmoids, whose sum is not 1, as
      released.
    """

    kind: str
    weights: Tensor


def attention_maps(model: nn.Module, x: Tensor, *more: Any) -> dict[str, AttentionMap]:
    """Return where the parts of a network look at an image.

    It runs the network once, with hooks on these parts that compute their weights a second time by PyTorch's
    operators, since the kernels keep none. So this is slower than inference, and holds all weights at once:
    those of iFormer grow with the square of the pixels, at 800x1333 to a gigabyte and more.

    Args:
        model: a network, pyramid or detector, or any module around or in one, in eval mode; of ours or one
            that `accelerate` was given. `deploy` leaves nothing to look into: give what it was given.
        x: images (B, C, H, W).
        *more: all else that the model takes, for example a detector's `mask`. To padding tokens give no
            weight.

    Returns:
        From the name of each part, as of `model.named_modules()`, in the order in which they run, to its
        `AttentionMap`. The attention of tokens or queries among themselves is not in it, and parts of the
        ablation "mlp", which mix positions, are not.

    Raises:
        TypeError: `model` has no such part, or `x` is no tensor.
        ValueError: `model` is in train mode; or as of the model, for an input that does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, supplement (two-way bridge); Yun and Ro, Dynamic
    Mobile-Former, equation 4; Zheng, iFormer, ICLR 2025, section 3.3.
    """
    check_tensor("attention_maps", "x", x, "B C H W")
    parts = {
        name: (part, _OF[type(part)])
        for name, part in getattr(model, "named_modules", lambda: ())()
        if type(part) in _OF and _attends(part)
    }
    if not parts:
        raise TypeError(
            "attention_maps: model must have bridges, iFormer's attention or dynamic convolutions of ours "
            f"(a deployed network has not), got {type(model).__name__}"
        )
    if model.training:
        raise ValueError("attention_maps: model must be in eval mode, call model.eval()")
    found: dict[str, AttentionMap] = {}

    def hook(name: str, of: Callable[..., AttentionMap]) -> Callable[..., None]:
        def run(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = of(part, *args, **kwargs)

        return run

    handles = [
        part.register_forward_pre_hook(hook(name, of), with_kwargs=True) for name, (part, of) in parts.items()
    ]
    try:
        with torch.no_grad():
            model(x, *more)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _attends(part: nn.Module) -> bool:
    if isinstance(part, MobileToFormer):
        return hasattr(part, "q")
    return hasattr(part, "k") if isinstance(part, FormerToMobile) else True


def _mobile_to_former(
    part: Any,
    x: Any,
    tokens: Tensor | None = None,
    return_logits: bool = True,
    position: Tensor | None = None,
    padding: Padding | None = None,
) -> AttentionMap:
    x, tokens = map_and_tokens("MobileToFormer", x, tokens, part.token_dim)
    queries = part.q(tokens if position is None else tokens + position).transpose(0, 1)
    return _over_pixels(part.k(x) if hasattr(part, "k") else x, queries, part.num_heads, padding)


def _dmf_mobile_to_former(part: Any, x: Tensor, tokens: Tensor) -> AttentionMap:
    return _over_pixels(x, part.q(part.norm(tokens)), part.num_heads)


def _former_to_mobile(part: Any, x: Any, tokens: Tensor | None = None) -> AttentionMap:
    x, tokens = map_and_tokens("FormerToMobile", x, tokens, part.token_dim)
    return _over_tokens(
        part.q(x) if hasattr(part, "q") else x, part.k(tokens).transpose(0, 1), part.num_heads
    )


def _dmf_former_to_mobile(part: Any, x: Tensor, tokens: Tensor) -> AttentionMap:
    keys = part.kv(part.norm(tokens)).chunk(2, dim=-1)[0]
    return _over_tokens(x, keys, part.num_heads)


def _pixels(part: Any, x: Tensor) -> AttentionMap:
    if part.window_size is not None:
        x = split_windows(x, part.window_size)
    q, k = part.q(x).flatten(2), part.k(x).flatten(2)
    weights = torch.softmax(q.transpose(1, 2) @ k * part.scale, dim=-1)
    return AttentionMap("pixels", weights.unflatten(-1, x.shape[2:]))


def _kernels(part: Any, *inputs: Tensor) -> AttentionMap:
    return AttentionMap("kernels", type(part).forward(part, *inputs))


def _over_pixels(x: Tensor, queries: Tensor, heads: int, padding: Padding | None = None) -> AttentionMap:
    logits = _logits(x, queries, heads)
    if padding is not None:
        logits = logits.masked_fill(~padding.inside(x)[:, None], -torch.inf)
    return AttentionMap("mobile_to_former", F.softmax(logits.flatten(3), dim=-1).view_as(logits))


def _over_tokens(x: Tensor, keys: Tensor, heads: int) -> AttentionMap:
    return AttentionMap("former_to_mobile", torch.softmax(_logits(x, keys, heads), dim=2))


def _logits(x: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """(B, heads, T, H, W) of a map (B, C, H, W) and of tokens (B, T, C), scaled."""
    pixels = x.flatten(2).unflatten(1, (heads, -1))  # (B, heads, C / heads, N)
    by_head = tokens.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, T, C / heads)
    return (by_head @ pixels * pixels.shape[2] ** -0.5).unflatten(-1, x.shape[2:])


_OF: dict[type[nn.Module], Callable[..., AttentionMap]] = {
    MobileToFormer: _mobile_to_former,
    FormerToMobile: _former_to_mobile,
    DMFMobileToFormer: _dmf_mobile_to_former,
    DMFFormerToMobile: _dmf_former_to_mobile,
    SingleHeadModulationAttention: _pixels,
    KernelAttention: _kernels,
}

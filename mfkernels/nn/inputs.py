"""Take a feature map and tokens as the modules do."""

from torch import Tensor, nn

from ..checks import check_tensor

Pair = tuple[Tensor, Tensor]


def map_and_tokens(module: str, x: Tensor | Pair, tokens: Tensor | None, token_dim: int) -> Pair:
    """`(x, tokens)` from two arguments, or from one pair as the released modules take it.

    Raises as the modules' docstrings say.
    """
    pair = (x, tokens) if tokens is not None else x
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"{module}: expected x and tokens, or one pair (x, tokens), got {type(x).__name__} alone"
        )
    feature_map = check_tensor(module, "x", pair[0], "B C H W")
    tokens = check_tokens(module, pair[1], token_dim)
    if tokens.shape[1] != feature_map.shape[0]:
        raise ValueError(
            f"{module}: tokens (T, B, d) and x (B, C, H, W) must have the same batch size, "
            f"got {tuple(tokens.shape)} and {tuple(feature_map.shape)}"
        )
    return feature_map, tokens


def check_tokens(module: str, tokens: object, token_dim: int) -> Tensor:
    tokens = check_tensor(module, "tokens", tokens, "T B d")
    if tokens.shape[2] != token_dim:
        raise ValueError(
            f"{module}: tokens must have shape (T, B, d) with d = {token_dim}, got {tuple(tokens.shape)}"
        )
    return tokens


def check_channels(module: str, x: Tensor, channels: int) -> None:
    if x.shape[1] != channels:
        raise ValueError(f"{module}: x must have {channels} channels, got shape {tuple(x.shape)}")


def check_positions(module: str, height: int, width: int, positions: int) -> None:
    """Check the map's size, which the position-mixing layers fix: they are linear over the pixels."""
    if height * width != positions:
        raise ValueError(
            f"{module}: built with position mixing for maps of {positions} pixels, got {height} x {width}; "
            "build the network with the image size that it is to run at"
        )


def parameters_of(*layers: nn.Module) -> list[Tensor | None] | None:
    """Return weights and biases of layers in order, for an operator that does the work of them all.

    Return None where one of them must be called: see `untouched`.
    """
    if not all(untouched(layer, nn.Linear, nn.LayerNorm) and layer.weight is not None for layer in layers):
        return None
    return [value for layer in layers for value in (layer.weight, layer.bias)]  # type: ignore[misc]


def same_epsilon(*norms: nn.Module) -> bool:
    """Return whether both add the same to the variance; a part without an `eps` does not."""
    values = {getattr(norm, "eps", None) for norm in norms}
    return len(values) == 1 and None not in values


def check_mixing(module: str, mixing: str) -> None:
    if mixing not in ("attn", "mlp", "mlp_attn"):
        raise ValueError(f"{module}: mixing must be 'attn', 'mlp' or 'mlp_attn', got {mixing!r}")


def needed(module: str, mixing: str, name: str, value: int | None) -> int:
    """Return the argument `name`, which `mixing` cannot do without."""
    if value is None:
        raise ValueError(f"{module}: mixing {mixing!r} needs {name}, got None")
    return value


def untouched(part: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether something else may do the work of `part`.

    It must be of one of these very classes (no adapter around it, no subclass) and run the `forward` of its
    class, and nobody may wait for its calls.
    """
    return type(part) in kinds and "forward" not in part.__dict__ and not has_hooks(part)


def has_hooks(part: nn.Module) -> bool:
    """Return whether somebody waits for calls of `part`.

    PyTorch's global hooks do not count: who counts operations or takes times registers them, and shall see
    what runs without them.
    """
    facts = part.__dict__
    return bool(
        facts["_forward_hooks"]
        or facts["_forward_pre_hooks"]
        or facts["_backward_hooks"]
        or facts["_backward_pre_hooks"]
    )

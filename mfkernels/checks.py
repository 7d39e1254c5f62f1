"""Check arguments. Each message names the operator, the argument, what came and what was expected."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensor(op: str, name: str, value: object, axes: str) -> Tensor:
    """Check that `value` is a floating-point tensor with as many axes as `axes` has words."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")
    if value.dim() != len(axes.split()):
        raise ValueError(
            f"{op}: {name} must have {len(axes.split())} dimensions ({axes.replace(' ', ', ')}), "
            f"got shape {tuple(value.shape)}"
        )
    return value


def check_like(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check that `value` has the dtype and the device of `like`."""
    if value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {like_name}, {like.dtype}, got {value.dtype}")
    check_device(op, name, value, like_name, like)


def check_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check that `value` is on the device of `like`."""
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {like_name}, {like.device}, got {value.device}"
        )


def check_shape(op: str, name: str, value: Tensor, axes: str, shape: Sequence[int]) -> None:
    """Check that `value` has exactly this shape; `axes` names its axes."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must have shape ({axes.replace(' ', ', ')}) = {tuple(shape)}, "
            f"got {tuple(value.shape)}"
        )


def check_argument(
    op: str, name: str, value: object, axes: str, shape: Sequence[int], like_name: str, like: Tensor
) -> None:
    """Check the kind, the axes, the dtype, the device and the shape of an argument."""
    tensor = check_tensor(op, name, value, axes)
    check_like(op, name, tensor, like_name, like)
    check_shape(op, name, tensor, axes, shape)


def check_mask(op: str, mask: object, x: Tensor) -> None:
    """Check that `mask` is a bool tensor (B, H, W) for the map `x`, on its device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor, got {found}")
    if mask.layout != torch.strided:
        raise TypeError(f"{op}: mask must be a dense tensor, got layout {mask.layout}")
    check_shape(op, "mask", mask, "B H W", (x.shape[0], *x.shape[2:]))
    check_device(op, "mask", mask, "x", x)


def as_given(*values: Any) -> tuple[Any, ...]:
    """Return the values as they are: what an operator does under autocast that takes several dtypes."""
    return values


def as_first(*values: Any) -> tuple[Any, ...]:
    """Return the values, where autocast is on with tensors in the first one's dtype.

    Autocast leaves a network with a map in one dtype and coefficients in another. The map, which is large,
    stays as it is. Where autocast is off, different dtypes are the caller's mistake.
    """
    return _in_dtype(values, values[0].dtype) if _is_autocast(values) else values


def as_widest(*values: Any) -> tuple[Any, ...]:
    """Return the values, where autocast is on with tensors in the widest of their dtypes."""
    if not _is_autocast(values):
        return values
    dtypes = (v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return _in_dtype(values, functools.reduce(torch.promote_types, dtypes))


def _is_autocast(values: Sequence[Any]) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    first = values[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return False
    device = first.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _in_dtype(values: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


def check_heads(
    op: str, num_heads: object, channels: int, of: str = "the channels of x", unit: str = "channels"
) -> None:
    if not isinstance(num_heads, (int, torch.SymInt)) or isinstance(num_heads, bool):
        raise TypeError(f"{op}: num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or channels % int(num_heads) != 0:
        raise ValueError(
            f"{op}: num_heads must be positive and divide {of}, got {num_heads} for {channels} {unit}"
        )


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors of a result in order, however tuples and lists nest them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple | list) else []


def register_fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Register the results' shapes of `torch.ops.mfkernels.<op>` for compilers and the device meta.

    PyTorch asks for them as soon as one argument is on that device, so the other arguments must be on it,
    too.
    """

    def register(function: Callable[..., Any]) -> None:
        def fake(*arguments: Any, **others: Any) -> Any:
            values = [*arguments, *others.values()]
            if len({value.device for value in values if isinstance(value, Tensor)}) > 1:
                schema = getattr(torch.ops.mfkernels, op).default._schema
                names = [*(argument.name for argument in schema.arguments[: len(arguments)]), *others]
                (first, given), *rest = (
                    p for p in zip(names, values, strict=True) if isinstance(p[1], Tensor)
                )
                for name, value in rest:
                    check_device(op, name, value, first, given)
            return function(*arguments, **others)

        torch.library.register_fake(f"mfkernels::{op}", fake)

    return register

"""PyTorch's operators in 80-bit arithmetic, for the truth that float64 kernels are measured against."""

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


def _axes(dims):
    return tuple(dims) if dims else None


def _add(a, b, alpha=1):
    return a + alpha * b


def _softmax(x, dim, half_to_float):
    weights = np.exp(x - x.max(axis=dim, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=dim, keepdims=True)


def _softmax_backward(grad, output, dim, dtype):
    return output * (grad - (grad * output).sum(axis=dim, keepdims=True))


def _windows(x, kernel, dilation, padding, stride):
    """For each tap: its number, and the slices of the padded map that it sees."""
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, d, p, s in zip(x, kernel, dilation, padding, stride, strict=True)
    ]
    for number, taps in enumerate(np.ndindex(*kernel)):
        starts = [t * d for t, d in zip(taps, dilation, strict=True)]
        rows, columns = (
            slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, stride, strict=True)
        )
        yield number, sizes, (..., rows, columns)


def _im2col(x, kernel, dilation, padding, stride):
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    taps = [padded[seen] for _, _, seen in _windows(x.shape[2:], kernel, dilation, padding, stride)]
    return np.stack(taps, 2).reshape(x.shape[0], x.shape[1] * len(taps), taps[0].shape[2] * taps[0].shape[3])


def _col2im(columns, size, kernel, dilation, padding, stride):
    batch, channels = columns.shape[0], columns.shape[1] // (kernel[0] * kernel[1])
    whole = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    padded = np.zeros((batch, channels, *whole), np.longdouble)
    columns = columns.reshape(batch, channels, kernel[0] * kernel[1], columns.shape[2])
    for number, sizes, seen in _windows(size, kernel, dilation, padding, stride):
        padded[seen] += columns[:, :, number].reshape(batch, channels, *sizes)
    return padded[..., padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _erf(x):
    """2 / sqrt(pi) exp(-x^2) sum_n 2^n x^(2n+1) / (1 3 5 ... (2n+1)), all terms of one sign."""
    x = np.clip(x, -9, 9)
    term, total = x, x
    for n in range(1, 300):
        term = term * 2 * x * x / (2 * n + 1)
        total = total + term
        if not np.any(np.abs(term) > 1e-22 * np.abs(total)):
            break
    return 2 / np.sqrt(np.longdouble(_PI)) * np.exp(-x * x) * total


_PI = 4 * np.arctan(np.longdouble(1))


def _gelu(x, approximate="none"):
    return x * (1 + _erf(x / np.sqrt(np.longdouble(2)))) / 2


def _gelu_backward(grad, x, approximate="none"):
    slope = (1 + _erf(x / np.sqrt(np.longdouble(2)))) / 2 + x * np.exp(-x * x / 2) / np.sqrt(2 * _PI)
    return grad * slope


def _layer_norm(x, shape, weight, bias, eps):
    mean = x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + np.longdouble(eps))
    return (x - mean) * scale * weight + bias, mean, scale


def _layer_norm_backward(grad, x, shape, mean, scale, weight, bias, mask):
    normal, g = (x - mean) * scale, grad * weight
    grad_x = scale * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return grad_x, (grad * normal).sum(rows), grad.sum(rows)


def _expand(x, shape):
    lead = (1,) * (len(shape) - x.ndim) + x.shape
    return np.broadcast_to(x, [m if n == -1 else n for n, m in zip(shape, lead, strict=True)])


_FUNCTIONS = {
    aten.mul: np.multiply,
    aten.add: _add,
    aten.sub: np.subtract,
    aten.div: np.divide,
    aten.neg: np.negative,
    aten.pow: np.power,
    aten.sqrt: np.sqrt,
    aten.eq: lambda a, b: (a == b).astype(np.longdouble),
    aten.bmm: np.matmul,
    aten.mm: np.matmul,
    aten.sum: lambda x, dims=(), keepdim=False, dtype=None: x.sum(axis=_axes(dims), keepdims=keepdim),
    aten.mean: lambda x, dims=(), keepdim=False, dtype=None: x.mean(axis=_axes(dims), keepdims=keepdim),
    aten.linalg_vector_norm: lambda x, order, dims, keepdim: np.sqrt(
        (x * x).sum(axis=_axes(dims), keepdims=keepdim)
    ),
    aten.masked_fill_: lambda x, mask, value: np.where(mask != 0, np.longdouble(value), x),
    aten.im2col: _im2col,
    aten.col2im: _col2im,
    aten.sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    aten.sigmoid_backward: lambda grad, y: grad * y * (1 - y),
    aten.gelu: _gelu,
    aten.gelu_backward: _gelu_backward,
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten.addmm: lambda c, a, b: c + a @ b,
    aten.split: lambda x, size, dim: np.split(x, range(size, x.shape[dim], size), dim),
    aten.cat: lambda parts, dim=0: np.concatenate(parts, dim),
    aten.slice: lambda x, dim=0, start=None, end=None, step=1: x[
        (*[slice(None)] * dim, slice(start, end, step))
    ],
    aten.new_zeros: lambda x, size, **_: np.zeros(size, np.longdouble),
    aten.relu: lambda x: np.maximum(x, 0),
    aten.threshold_backward: lambda grad, y, threshold: np.where(y > threshold, grad, 0),
    aten.hardtanh: np.clip,
    aten.hardtanh_backward: lambda grad, x, low, high: np.where((low < x) & (x < high), grad, 0),
    aten.amax: lambda x, dims=(), keepdim=False: x.max(axis=_axes(dims), keepdims=keepdim),
    aten._softmax: _softmax,
    aten._softmax_backward_data: _softmax_backward,
    aten.masked_fill: lambda x, mask, value: np.where(mask != 0, np.longdouble(value), x),
    aten.scalar_tensor: lambda value, **_: np.longdouble(value),
    aten.view: lambda x, shape: x.reshape(shape),
    aten._unsafe_view: lambda x, shape: x.reshape(shape),
    aten.expand: _expand,
    aten.permute: np.transpose,
    aten.transpose: np.swapaxes,
    aten.t: np.transpose,
    aten.unsqueeze: np.expand_dims,
    aten.squeeze: np.squeeze,
    aten.clone: lambda x, memory_format=None: x,
    aten._to_copy: lambda x, **_: x,
    aten.detach: lambda x: x,
    aten.alias: lambda x: x,
}


class Wide(Tensor):
    """A float64 tensor for autograd; its numbers are the 80-bit ones of `array`."""

    array: np.ndarray

    @staticmethod
    def __new__(cls, array):
        wide = Tensor._make_wrapper_subclass(cls, array.shape, dtype=torch.float64)
        wide.array = array
        return wide

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        self = args[0] if args else None
        args = tree_map_only(Tensor, lambda t: t.array if isinstance(t, Wide) else t.numpy(), args)
        with np.errstate(all="ignore"):
            result = _FUNCTIONS[func.overloadpacket](*args, **kwargs or {})
        if isinstance(result, tuple | list):
            return type(result)(cls(part) for part in result)
        result = np.asarray(result)
        if func._schema.is_mutable:  # autograd's own masked_fill_
            args[0][...] = result
            return self
        return cls(result)


def widen(x: Tensor) -> Wide:
    return Wide(x.detach().numpy().astype(np.longdouble))


def narrow(results: dict[str, Wide]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The numbers rounded to float64, and what that leaves off."""
    high = {k: v.array.astype(np.float64) for k, v in results.items()}
    low = {k: (v.array - high[k]).astype(np.float64) for k, v in results.items()}
    return tuple({k: torch.from_numpy(v) for k, v in part.items()} for part in (high, low))

import torch
from torch import Tensor

from ... import native
from ...checks import check_argument, check_like, check_shape, check_tensor, register_fake
from ..layout import empty_map, gradients_like, memory_format, without_absent
from ..runner import Runner
from .library import dynamic_conv2d_by_library
from .reference import Pair, dynamic_conv2d_reference, output_size

OP = "dynamic_conv2d"
MOST = (1 << 63) - 1  # that fits into what operators take
# Where a processor has sixteen vector registers PyTorch's products of matrices are the faster ones, in
# float32 (in other types they are slower, or round the mixed kernels), for 1x1 kernels of more inputs than
# this; with gradients, for so many products that a few calls more do not count.
_MANY_INPUTS, _DENSE = 256, 4_000_000


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    basis: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    basis_bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    basis_scale: float = 0.1,
) -> Tensor:
    """Convolution whose kernel differs from sample to sample: a static one plus a mix of K others.

    Sample b is convolved with `weight + basis_scale * sum_k attention[b,k] * basis[k]`; to that come
    `bias + sum_k attention[b,k] * basis_bias[k]`. The mixed kernels are made where they are used.

    Args:
        x: (B, C, H, W), any strides.
        weight: (O, C / groups, kh, kw).
        basis: (K, O, C / groups, kh, kw). With K = 0 it is a plain convolution.
        attention: (B, K). Need not sum to one.
        bias: None, or (O,).
        basis_bias: None, or (K, O); not scaled by `basis_scale`.
        stride, padding, dilation: of both directions, or a pair for height and width.
        groups: a divisor of C and O.
        basis_scale: factor of the basis.

    All of one dtype (kernels: float32, float64, bfloat16) and on one device. Under autocast they may
    differ, and the dtype of `x` is taken.

    Returns:
        (B, O, H', W') in x's dtype and memory format, H' and W' as of `torch.nn.functional.conv2d`.

    Raises:
        TypeError: an argument is no floating-point tensor, or its dtype is not that of `x`; a setting is
            no int or pair of ints.
        ValueError: a shape, a device or a setting does not fit, or the result would have no pixel.

    Source: Yun and Ro, Dynamic Mobile-Former, equations 3 and 4; the factor 0.1 from its released code.
    """
    strides = _setting("stride", stride, 1)
    paddings = _setting("padding", padding, 0)
    dilations = _setting("dilation", dilation, 1)
    settings = (strides, paddings, dilations, groups, basis_scale)
    return _run(x, weight, basis, attention, bias, basis_bias, *settings)


def convolve_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve all samples with the same 1x1 kernels, of which nothing is checked."""
    none = weight.new_empty(0, *weight.shape), x.new_empty(x.shape[0], 0)
    return _run(x, weight, *none, None, None, (1, 1), (0, 0), (1, 1), 1, 1.0)


def _setting(name: str, value: object, least: int) -> Pair:
    values = value if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) for v in values):
        raise TypeError(f"{OP}: {name} must be an int or a pair of ints, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{OP}: {name} must be at least {least}, got {value!r}")
    if max(values) > MOST:
        raise ValueError(f"{OP}: {name} must be below 2^63, got {value!r}")
    return values[0], values[1]


def _by_library(
    tracked, x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, basis_scale
) -> bool:
    if x.dtype != torch.float32 or x.dim() != 4 or x.numel() == 0:
        return False
    if not (isinstance(weight, Tensor) and weight.dim() == 4 and isinstance(groups, int)):
        return False  # and the checks say why
    if isinstance(basis, Tensor) and basis.shape[:1].numel() == 0:
        return False  # nothing to mix
    if weight.shape[2:].numel() > 1 or max(padding) > 0:
        return False
    products = x.shape[0] * x.shape[2] * x.shape[3] // (stride[0] * stride[1]) * weight.numel()
    many = weight.shape[1] > _MANY_INPUTS or (tracked and products >= _DENSE)
    return max(stride) > 1 or (many and x.is_cpu and native.instruction_set().startswith("avx2"))


def _library(
    x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, basis_scale
) -> Tensor:
    if max(stride) > 1:
        x = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=memory_format(x))
        settings = (1, 1), padding, dilation, groups, basis_scale  # without what is skipped
        return _run(x, weight, basis, attention, bias, basis_bias, *settings)
    y = dynamic_conv2d_by_library(x, weight, basis, attention, bias, basis_bias, groups, basis_scale)
    return y.contiguous(memory_format=memory_format(x))


def _check(
    x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, basis_scale
) -> None:
    check_tensor(OP, "x", x, "B C H W")
    check_tensor(OP, "weight", weight, "O C/groups kh kw")
    batch, channels, height, width = x.shape
    outputs, _, *kernel = weight.shape
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{OP}: groups must be an int, got {type(groups).__name__}")
    if groups < 1 or channels % groups or outputs % groups:
        raise ValueError(
            f"{OP}: groups must be positive and divide the channels of x and the outputs, got {groups} for "
            f"{channels} channels and {outputs} outputs"
        )
    check_like(OP, "weight", weight, "x", x)
    shape = (outputs, channels // groups, *kernel)
    check_shape(OP, "weight", weight, "O C/groups kh kw", shape)
    check_tensor(OP, "basis", basis, "K O C/groups kh kw")
    check_like(OP, "basis", basis, "x", x)
    kernels = basis.shape[0]
    check_shape(OP, "basis", basis, "K O C/groups kh kw", (kernels, *shape))
    check_argument(OP, "attention", attention, "B K", (batch, kernels), "x", x)
    if bias is not None:
        check_argument(OP, "bias", bias, "O", (outputs,), "x", x)
    if basis_bias is not None:
        check_argument(OP, "basis_bias", basis_bias, "K O", (kernels, outputs), "x", x)
    if min(kernel) < 1 or channels < 1 or outputs < 1:
        raise ValueError(f"{OP}: weight must have no empty axis, got shape {tuple(weight.shape)}")
    if min(output_size((height, width), kernel, stride, padding, dilation)) < 1:
        raise ValueError(
            f"{OP}: x is too small: {height} x {width} pixels with padding {padding}, for a kernel of "
            f"{kernel[0]} x {kernel[1]} with dilation {dilation}"
        )


@register_fake(OP)
def _(x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, basis_scale):
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_map(x, (x.shape[0], weight.shape[0], *size))


@register_fake(f"{OP}_backward")
def _(grad_out, x, weight, basis, attention, bias, basis_bias, *settings):
    return empty_map(x, x.shape), *gradients_like((weight, basis, attention, bias, basis_bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _backward(ctx, grad_out):
    inputs = ctx.saved_tensors
    grads = _run.backward(grad_out, *inputs, *ctx.settings)
    return *without_absent(inputs, grads), *[None] * len(ctx.settings)


_run = Runner(
    *(OP, dynamic_conv2d_reference, _check, _setup_context, _backward),
    library=_library,
    by_library=_by_library,
)

"""Convolutions of detectors' heads, which several maps go through."""

from collections.abc import Iterable

from torch import nn

from . import steps
from .packing import fold
from .plan import MOST_SIZE, Map, Plan
from .steps import ACTIVATIONS


class Convolution:
    """A dense convolution, and a batch norm and a ReLU where they follow; its weights are packed once.

    Args:
        plan: which it adds steps to.
        layers: the convolution, and what follows it.
        relu: whether a ReLU follows that is not among them.
    """

    def __init__(self, plan: Plan, layers: Iterable[nn.Module], relu: bool = False) -> None:
        conv, *rest = layers
        if not isinstance(conv, nn.Conv2d):
            raise plan.refuse(conv, "unknown to deploy")
        weight, bias = conv.weight, conv.bias
        if rest and isinstance(rest[0], nn.BatchNorm2d):
            weight, bias = fold(conv, rest.pop(0))  # type: ignore[arg-type, assignment]
        if rest and isinstance(rest[0], nn.ReLU):
            relu = bool(rest.pop(0))
        if rest:
            raise plan.refuse(rest[0], "unknown to deploy behind a convolution of a detector")
        size = conv.kernel_size[0]
        fits = conv.groups == 1 and conv.kernel_size == (size, size) and size % 2 == 1 and size <= MOST_SIZE
        fits = fits and conv.padding == (size // 2, size // 2)
        fits = fits and (conv.stride == (1, 1) or (conv.stride == (2, 2) and size > 1))
        plan.need(fits, conv, "dense convolutions of odd squares, padded by half of them, of stride 1 or 2")
        self.plan, self.size, self.stride = plan, size, conv.stride[0]
        self.inputs, self.outputs = conv.in_channels, conv.out_channels
        self.activation = "relu" if relu else None
        self.linear = plan.pack.linear(weight.permute(0, 2, 3, 1).flatten(1), bias)

    def __call__(self, x: Map) -> Map:
        """Add it for one map."""
        if self.size == 1:
            return self.plan.pointwise(x, self.outputs, self.linear, activation=self.activation)
        numbers = (x.number, self.inputs, self.size, self.stride, self.size // 2, 1)
        out, act = self.plan.out(self.outputs), ACTIVATIONS.index(self.activation)
        return self.plan.made("dense_conv", steps.Conv(out, *numbers, act, self.linear))

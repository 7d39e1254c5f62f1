"""Replace dynamic ReLUs with intercepts.

The classes are DyReLUA and DyReLUB of Islanna's DynamicReLU and its copies, DyReLUB of EfficientAT, and
DyReLU of mmdetection.

Where several functions attain the maximum, the gradient is split among them; theirs give it to one of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .override import Override, override
from .settings import Found, random_inputs


class _Scaled(Override):
    lambdas: Tensor
    init_v: Tensor
    get_relu_coefs: Callable[[Tensor], Tensor]

    def activate(self, x: Tensor, theta: Tensor, functions: int) -> Tensor:
        """`x` (B, C, ...) with theta (B, C 2K) or, for all channels, (B, 2K)."""
        coefficients = theta.view(theta.shape[0], -1, 2 * functions) * self.lambdas + self.init_v
        coefficients = coefficients.transpose(1, 2).expand(-1, -1, x.shape[1])
        slopes, intercepts = coefficients.split(functions, 1)
        return ops.dynamic_relu(x, slopes, intercepts)


class SelfDynamicReLU(_Scaled):
    """Coefficients from the map's own mean."""

    k: int

    def forward(self, x: Tensor) -> Tensor:
        theta = self.get_relu_coefs(x)
        if x.dim() == 3:
            return self.activate(x[..., None], theta, self.k)[..., 0]
        return self.activate(x, theta, self.k)


class ContextDynamicReLU(_Scaled):
    """Coefficients from the context of a block of EfficientAT."""

    M: int

    def forward(self, x: Tensor, g: tuple[Tensor, ...]) -> Tensor:
        return self.activate(x, self.get_relu_coefs(g[0].flatten(1)), self.M)


class SqueezeDynamicReLU(Override):
    """Coefficients from two convolutions, in the order slope, intercept, slope, intercept."""

    global_avgpool: Callable[[Tensor], Tensor]
    conv1: Callable[[Tensor], Tensor]
    conv2: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        theta = self.conv2(self.conv1(self.global_avgpool(x))) - 0.5
        first, first_intercept, second, second_intercept = theta.flatten(1).chunk(4, 1)
        slopes = torch.stack([2 * first + 1, 2 * second], 1)
        return ops.dynamic_relu(x, slopes, torch.stack([first_intercept, second_intercept], 1))


def self_dynamic_relu(old: Any) -> Found:
    if type(old).__name__ not in ("DyReLUA", "DyReLUB") or hasattr(old, "coef_net"):
        return None
    shape = (2, old.channels, 5, 6) if old.conv_type == "2d" else (2, old.channels, 7)
    return override(SelfDynamicReLU, old), lambda: random_inputs(shape)


def context_dynamic_relu(old: Any) -> Found:
    if type(old).__name__ != "DyReLUB" or not hasattr(old, "coef_net"):
        return None
    shapes = (2, old.channels, 5, 6), (2, old.coef_net[0].in_features, 1, 1)

    def inputs() -> tuple:
        x, context = random_inputs(*shapes)
        return x, (context,)

    return override(ContextDynamicReLU, old), inputs


def squeeze_dynamic_relu(old: Any) -> Found:
    if type(old).__name__ != "DyReLU" or not hasattr(old, "global_avgpool"):
        return None
    return override(SqueezeDynamicReLU, old), lambda: random_inputs((2, old.channels, 5, 6))


RULES = (self_dynamic_relu, context_dynamic_relu, squeeze_dynamic_relu)

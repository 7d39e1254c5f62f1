"""The global response norm of ConvNeXt V2 as timm and transformers have it."""

from typing import Any

from torch import Tensor

from .. import ops
from .override import Override, override
from .settings import Found, random_inputs


class ResponseNorm(Override):
    """timm's for maps (B, H, W, C) or (B, C, H, W); that of transformers is for (B, H, W, C)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        channels_last = getattr(self, "channel_dim", -1) == -1
        x = x.permute(0, 3, 1, 2) if channels_last else x
        parameters = self.weight.flatten(), self.bias.flatten()
        y = ops.global_response_norm(x, *parameters, mean="channels", eps=getattr(self, "eps", 1e-6))
        return y.permute(0, 2, 3, 1) if channels_last else y


def global_response_norm(old: Any) -> Found:
    if type(old).__name__ not in ("GlobalResponseNorm", "ConvNextV2GRN"):
        return None
    channels = old.weight.numel()
    shape = (2, 5, 6, channels) if getattr(old, "channel_dim", -1) == -1 else (2, channels, 5, 6)
    return override(ResponseNorm, old), lambda: random_inputs(shape)


RULES = (global_response_norm,)

"""The blocks of Mobile-Former: a bottleneck of convolutions (Mobile), tokens (Former), and two bridges."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..streams import side_by_side
from .depthwise import depthwise_layers, pointwise_layers
from .drop_path import DropPath
from .dynamic_relu import DynamicReLU
from .former_block import Former
from .former_to_mobile_attention import FormerToMobile
from .fused_sequential import FusedSequential
from .inputs import Pair, check_channels, map_and_tokens, parameters_of, untouched
from .mobile_to_former_attention import MobileToFormer
from .padding import Padding, hide
from .replacement import Replacement
from .token_hyper import HyperNetwork


class _TokenBlock(Replacement, ABC):
    """Share what the two blocks with tokens have in common; `MobileFormerBlock` explains the arguments."""

    conv1: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        expansion: Any,
        token_dim: int,
        token_num: int,
        token_id: int = 0,
        se_flag: tuple[int, int, int, int] = (2, 0, 2, 0),
        hyper_reduction: int = 4,
        groups: int = 1,
        kernel_size: tuple[int, int] = (3, 3),
        num_heads: int = 2,
        gates: tuple[bool, bool, bool] = (True, False, False),
        ffn: bool = True,
        mixing: str = "attn",
        mlp_expansion: int = 4,
        positions: int | None = None,
        local_projection: bool = False,
        drop_path: float = 0.0,
        depthwise: str = "dw",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if token_id == -1 and "attn" not in mixing:
            raise ValueError(f"{name}: token_id -1 needs attention, got mixing {mixing!r}")
        if token_id >= token_num:
            raise ValueError(f"{name}: token_id must be below token_num = {token_num}, got {token_id}")
        if len(se_flag) != 4 or se_flag[3] not in (0, 1):
            raise ValueError(f"{name}: se_flag must be four numbers, the last 0 or 1, got {tuple(se_flag)}")
        self.in_channels, self.stride = in_channels, stride
        self.token_dim, self.token_id = token_dim, token_id
        self.skip = stride == 1 and in_channels == out_channels
        self.se_flag = tuple(se_flag)
        self._hyper_options: dict[str, int] = dict(token_id=token_id, reduction=hyper_reduction)
        self._add_mobile(in_channels, out_channels, expansion, se_flag, groups, kernel_size, depthwise)
        self.drop_path = DropPath(drop_path)
        common: dict[str, Any] = dict(token_num=token_num, mixing=mixing, drop_path=drop_path)
        bridge: dict[str, Any] = dict(num_heads=num_heads, local_projection=local_projection, **common)
        self.local_global = MobileToFormer(
            in_channels, token_dim, gate=gates[0], positions=positions, **bridge
        )
        self.global_block = Former(token_dim, gate=gates[1], ffn=ffn, mlp_expansion=mlp_expansion, **common)
        out_positions = None if positions is None else positions // stride**2
        self.global_local = FormerToMobile(
            out_channels, token_dim, gate=gates[2], positions=out_positions, **bridge
        )

    @abstractmethod
    def _add_mobile(
        self,
        inputs: int,
        outputs: int,
        expansion: Any,
        se_flag: tuple[int, int, int, int],
        groups: int,
        kernel_size: tuple[int, int],
        depthwise: str,
    ) -> None:
        """Make the convolutions, activations and hyper networks."""

    @abstractmethod
    def _generators(self) -> tuple[tuple[DynamicReLU, nn.Module], tuple[DynamicReLU, nn.Module]]:
        """Return the activations of the hidden maps, and what makes their coefficients."""

    @abstractmethod
    def _mobile(
        self,
        x: Tensor,
        first: Tensor,
        tokens: Tensor,
        logits: Tensor | None,
        slopes: Sequence[Tensor | None],
        back: Callable[[Tensor], Tensor],
        padding: Padding | None,
    ) -> Tensor:
        """Return the output map, from the first convolution's map and the updated tokens.

        `back` is the bridge from these tokens.
        """

    def forward(self, x: Tensor | Pair, tokens: Tensor | None = None, padding: Padding | None = None) -> Pair:
        x, tokens = map_and_tokens(type(self).__name__, x, tokens, self.token_dim)
        check_channels(type(self).__name__, x, self.in_channels)

        def former() -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]]:
            # The released blocks take the dynamic coefficients from the updated tokens, but the attention
            # that mixes them from the query before the update.
            if padding is not None or untouched(self.local_global, MobileToFormer):
                new, logits = self.local_global(x, tokens, self.token_id == -1, padding=padding)
            else:  # whoever waits for its calls, or stands around it, knows the released form
                new, logits = self.local_global((x, tokens))
                logits = logits if self.token_id == -1 else None
            new = self.global_block(new)
            return new, logits, self._slopes(new)

        # Until it needs these coefficients, Mobile has work that needs nothing of the tokens.
        made, first = side_by_side(former, lambda: self.conv1(x), x, tokens)
        out = self._mobile(x, first, *made, lambda out: self.global_local((out, made[0])), padding)
        return hide(out, padding), made[0]

    def _hyper(self, channels: int, functions: int) -> nn.Module:
        if functions < 1:
            return nn.Identity()
        return HyperNetwork(self.token_dim, channels * functions, **self._hyper_options)

    def _slopes(self, tokens: Tensor) -> Sequence[Tensor | None]:
        """Return both generators' slopes in one call, for dynamic ReLUs of one token; None for others."""
        if self.token_id < 0 or self.se_flag[0] != 2 or self.se_flag[2] != 2:
            return (None, None)
        layers = [layer for act, hyper in self._generators() for layer in _layers_of(act, hyper)]
        parameters = parameters_of(*layers) if len(layers) == 4 else None
        if parameters is None:
            return (None, None)
        slopes: Any = ops.token_hyper(tokens[self.token_id], *parameters)  # type: ignore[arg-type]
        return slopes

    def _attention(
        self, logits: Tensor | None, size: Sequence[int], padding: Padding | None
    ) -> Tensor | None:
        """Return the weights (B, T, H', W') that mix the tokens' coefficients, for a map of `size`."""
        if logits is None:
            return None
        logits = logits.mean(dim=1)
        if self.stride == 2 and padding is not None:
            logits = padding.halve(logits)
        elif self.stride > 1:
            logits = F.adaptive_avg_pool2d(logits, (size[0], size[1]))
        return torch.softmax(logits, dim=1)


def _layers_of(act: nn.Module, hyper: Any) -> list[nn.Module]:
    """Return the two layers of a hyper network.

    Return none where a hook or the like means that a part of it, or the activation, has to be called.
    """
    if not (untouched(act, DynamicReLU) and untouched(hyper, HyperNetwork)):
        return []
    if not untouched(hyper.hyper, nn.Sequential):
        return []
    first, relu, second, *gate = hyper.hyper
    plain = untouched(relu, nn.ReLU) and all(untouched(layer, nn.Hardsigmoid) for layer in gate)
    return [first, second] if plain and len(gate) == 1 else []


def _activate(
    functions: int,
    act: nn.Module,
    hyper: nn.Module,
    x: Tensor,
    tokens: Tensor,
    attention: Tensor | None,
    slopes: Tensor | None = None,
) -> Tensor:
    if slopes is not None:
        return ops.dynamic_relu(x, slopes)
    return act(x, hyper(tokens), attention) if functions > 0 else act(x)


class MobileFormerBlock(_TokenBlock):
    """The Mobile-Former block: 1x1, depthwise and 1x1 convolution, and tokens.

    Args:
        in_channels, out_channels, stride: of the feature map.
        expansion: hidden channels / in_channels.
        token_dim, token_num: d and T.
        token_id: the token whose coefficients the dynamic activations take; -1: those of all tokens, mixed
            per position (spatial-aware).
        se_flag: functions of the activations as the released code numbers them: [0] and [2] for the two
            hidden ones (2 dynamic ReLU, 1 squeeze-and-excitation, 0 relu6, -1 none), [3] = 1 for
            squeeze-and-excitation of the output; [1] is not used.
        hyper_reduction: the hyper networks have d / hyper_reduction hidden units.
        groups: of the 1x1 convolutions; with more than one, channels are shuffled.
        kernel_size: of the depthwise convolutions: of the first, of the second.
        num_heads, gates, ffn, mixing, mlp_expansion, local_projection: see `MobileToFormer`, `Former` and
            `FormerToMobile`; one gate for each of the three.
        positions: pixels of the input map; for position mixing ("mlp") only.
        drop_path: rate of stochastic depth, of the convolutions and of the tokens.
        before_skip: ablation: Mobile <- Former before the residual instead of after it.

    Inputs:
        x (B, in_channels, H, W) and tokens (T, B, d), or one pair of them. `padding`: None, or what of the
        map is padding. There `x` must be zero, and what comes out is; the rest does not depend on it, save
        that batch norms in train mode count its pixels.

    Returns:
        x (B, out_channels, ceil(H / stride), ceil(W / stride)) and tokens (T, B, d).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `DnaBlock`. Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2 and figure 3.
    """

    def __init__(self, *args: Any, before_skip: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before_skip = before_skip

    def _add_mobile(self, inputs, outputs, expansion, se_flag, groups, kernel_size, depthwise):
        hidden = round(inputs * expansion)

        def shuffle():
            return nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()

        self.conv1 = FusedSequential(*pointwise_layers(inputs, hidden, groups), shuffle())
        self.act1 = DynamicReLU(se_flag[0])
        self.hyper1 = self._hyper(hidden, se_flag[0])
        self.conv2 = FusedSequential(
            *depthwise_layers(hidden, hidden, kernel_size[0], self.stride, depthwise)
        )
        self.act2 = DynamicReLU(se_flag[2])
        self.hyper2 = self._hyper(hidden, se_flag[2])
        self.conv3 = FusedSequential(*pointwise_layers(hidden, outputs, groups), shuffle())
        self.act3 = DynamicReLU(1 if se_flag[3] else -1, relu6_first=False)
        self.hyper3 = self._hyper(outputs, se_flag[3])

    def _generators(self):
        return (self.act1, self.hyper1), (self.act2, self.hyper2)

    def _mobile(self, x, first, tokens, logits, slopes, back, padding):
        flag, attention = self.se_flag, self._attention(logits, first.shape[2:], padding)
        out = hide(_activate(flag[0], self.act1, self.hyper1, first, tokens, attention, slopes[0]), padding)
        out = _activate(flag[2], self.act2, self.hyper2, self.conv2(out), tokens, attention, slopes[1])
        out = _activate(flag[3], self.act3, self.hyper3, self.conv3(out), tokens, attention)
        if self.before_skip:
            out = back(out)
        if self.skip:
            out = self.drop_path(out) + x
        return out if self.before_skip else back(out)


class MobileFormerDownsample(_TokenBlock):
    """The Mobile-Former block that changes the resolution: depthwise, 1x1, depthwise, 1x1, and tokens.

    Arguments, inputs and results are those of `MobileFormerBlock`, but for these:

    Args:
        expansion: a pair: first hidden channels / in_channels, second hidden channels / out_channels.
        depthwise: "dw"; ablations "sepdw" and "maxdw", see `mfkernels.nn.depthwise`. There is no
            `before_skip`.

    State: the released `DnaBlock3`. Source: Chen et al., Mobile-Former, CVPR 2022, section 3.2
    ("downsample Mobile-Former block").
    """

    def __init__(self, *args: Any, depthwise: str = "dw", **kwargs: Any) -> None:
        super().__init__(*args, depthwise=depthwise, **kwargs)

    def _add_mobile(self, inputs, outputs, expansion, se_flag, groups, kernel_size, depthwise):
        hidden1, hidden2 = round(inputs * expansion[0]), round(outputs * expansion[1])

        def shuffle(channels):
            return nn.ChannelShuffle(channels) if groups > 1 else nn.Identity()

        # The maxima of two convolutions are shuffled otherwise: in `groups`, and only the first.
        max_kind = depthwise == "maxdw"
        self.conv1 = FusedSequential(
            *depthwise_layers(inputs, hidden1, kernel_size[0], self.stride, depthwise),
            shuffle(groups if max_kind else inputs),
        )
        self.act1 = DynamicReLU(se_flag[0])
        self.hyper1 = self._hyper(hidden1, se_flag[0])
        self.conv2 = FusedSequential(*pointwise_layers(hidden1, outputs, groups))
        self.conv3 = FusedSequential(
            *depthwise_layers(outputs, hidden2, kernel_size[1], 1, depthwise),
            nn.Identity() if max_kind else shuffle(outputs),
        )
        self.act3 = DynamicReLU(se_flag[2])
        self.hyper3 = self._hyper(hidden2, se_flag[2])
        self.conv4 = FusedSequential(*pointwise_layers(hidden2, outputs, groups))
        self.act4 = DynamicReLU(1 if se_flag[3] else -1, relu6_first=False)
        self.hyper4 = self._hyper(outputs, se_flag[3])

    def _generators(self):
        return (self.act1, self.hyper1), (self.act3, self.hyper3)

    def _mobile(self, x, first, tokens, logits, slopes, back, padding):
        flag, attention = self.se_flag, self._attention(logits, first.shape[2:], padding)
        middle = self.conv2(_activate(flag[0], self.act1, self.hyper1, first, tokens, attention, slopes[0]))
        middle = hide(middle, padding)
        out = _activate(flag[2], self.act3, self.hyper3, self.conv3(middle), tokens, attention, slopes[1])
        out = _activate(flag[3], self.act4, self.hyper4, self.conv4(out), tokens, attention)
        out = back(self.drop_path(out) + middle)
        return out + x if self.skip else out

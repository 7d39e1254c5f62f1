"""Mobile-Former as a plan for the kernels in csrc/cpu/deployed_mobile_former.h, whose fields it writes in
their order."""

from typing import Any

import torch
from torch import Tensor, nn

from ..models.mobile_former import MobileFormer
from ..nn import (
    ClassifierHead,
    DropPath,
    DynamicReLU,
    Former,
    FormerToMobile,
    FusedSequential,
    HyperNetwork,
    LiteBottleneck,
    MobileFormerBlock,
    MobileFormerDownsample,
    MobileToFormer,
)
from ..nn.conv_bn import affine
from .deployed import Deployed
from .packing import dense, fold, padded, padded_rows, padded_slots, shuffled, spread
from .planner import Planner
from .pyramid import DeployedPyramid, Wanted

MOST_BLOCKS = 255
_BLOCKS = (LiteBottleneck, MobileFormerBlock, MobileFormerDownsample)
_KNOWN = (
    *_BLOCKS,
    *(
        MobileFormer,
        ClassifierHead,
        DropPath,
        DynamicReLU,
        Former,
        FormerToMobile,
        HyperNetwork,
        MobileToFormer,
    ),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.ChannelShuffle, nn.Conv2d, nn.Dropout, nn.Embedding, nn.GELU),
    *(
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.ReLU,
        nn.ReLU6,
        nn.Sequential,
        FusedSequential,
    ),
)

_STEM, _LITE, _BLOCK, _DOWN = range(4)
_NO_LINEAR = [0, 0, 0, 0]
_OPERATOR = "deployed_mobile_former"


def deployed_mobile_former(model: MobileFormer, dtype: torch.dtype, wanted: Wanted | None = None) -> Deployed:
    """What `deploy` makes of a `MobileFormer`, or of these maps of it."""
    planner = _Planner(model, dtype, wanted)
    weights, plan = planner.run()
    parts = [part for name in ("stem", *planner.blocks) for part in (f"{name} tokens", name)]
    options: dict[str, Any] = dict(dtype=dtype, in_channels=model.in_channels)
    if wanted is not None:
        return DeployedPyramid(wanted, _OPERATOR, weights, plan, parts=parts, **options)
    parts += ["local_global", "classifier.conv", "classifier.fc", "classifier.classifier"]
    last: Any = model.classifier.classifier[1]
    return Deployed(_OPERATOR, weights, plan, classes=last.out_features, parts=parts, **options)


class _Planner(Planner):
    def __init__(self, model: MobileFormer, dtype: torch.dtype, wanted: Wanted | None) -> None:
        super().__init__(model, dtype)
        self.model = model
        self.blocks: dict[str, Any] = {f"features.{i}": block for i, block in enumerate(model.features)}
        self.handed_out = [] if wanted is None else [stage.name for stage in wanted.stages]
        if self.handed_out:
            last = list(self.blocks).index(self.handed_out[-1])
            self.blocks = dict(list(self.blocks.items())[: last + 1])
        self.heads = 0  # of the bridges; all have the same number
        self.former_heads = 0
        self.tokens, self.width = model.tokens.weight.shape

    def run(self) -> tuple[Tensor, list[int]]:
        model = self.model
        blocks = list(self.blocks.values())
        self.check_parts(_KNOWN)
        for block in blocks:
            if type(block) not in _BLOCKS:
                raise self.refuse(block, "unknown to deploy")
        if len(blocks) > MOST_BLOCKS:
            raise ValueError(f"deploy: at most {MOST_BLOCKS} blocks can be deployed, got {len(blocks)}")
        first = padded_rows(model.tokens.weight)
        passes = [*self.one_pass(None, blocks[0] if blocks else None), 0]
        for index, (name, block) in enumerate(self.blocks.items()):
            following = blocks[index + 1] if index + 1 < len(blocks) else None
            passes += [*self.one_pass(block, following), int(name in self.handed_out)]
        if self.handed_out:
            last, head, class_tokens = self.token_step(None, None, None), 3 * _NO_LINEAR, 0
        else:
            last, head = self.token_step(model.local_global, None, None), self.head(model.classifier)
            class_tokens = max(model.classifier.class_tokens, 0)
        hyper_tokens = {b.hyper1.token_id for b in blocks if not isinstance(b, LiteBottleneck)} or {0}
        if len(hyper_tokens) > 1:
            raise ValueError("deploy: all blocks must take their coefficients from the same token")
        header = [self.tokens, self.width, self.heads, self.former_heads, hyper_tokens.pop()]
        header += [class_tokens, self.pack.add(first)]
        plan = [
            self.pack.size,
            int(self.pack.dtype == torch.bfloat16),
            *header,
            *last,
            *head,
            len(blocks) + 1,
            *passes,
        ]
        return self.pack.tensor(), plan

    # --- passes ------------------------------------------------------------------------------------------

    def one_pass(self, block: Any, following: Any) -> list[int]:
        """The pass of `block`, None for the stem, and the step over the tokens before it."""
        if isinstance(following, LiteBottleneck) or (following is None and self.handed_out):
            bridge = None
        else:
            bridge = self.model.local_global if following is None else following.local_global
        # Weights lie in the order of their use.
        if block is None or isinstance(block, LiteBottleneck):
            step = self.token_step(None, None, bridge)
            fields = self.stem() if block is None else self.lite(block)
            scatter = 0
        else:
            step = self.token_step(block.local_global, block, bridge)
            fields = self.block(block) if isinstance(block, MobileFormerBlock) else self.down(block)
            scatter = 1
        gather = int(bridge is not None)
        return [*step, *fields, scatter, gather, int(gather and hasattr(bridge, "alpha"))]

    def stem(self) -> list[int]:
        stem: Any = self.model.stem
        conv, norm, _ = stem
        weight, bias = fold(conv, norm)
        linear = self.pack.linear(weight.flatten(1), bias, runs=weight.shape[1] * weight.shape[2])
        return [_STEM, conv.in_channels, conv.out_channels, 2, 0, 0, 0, 0, 0, *linear, *_NO_LINEAR]

    def lite(self, block: Any) -> list[int]:
        self.need(len(block.conv) == 6, block, "3x3 depthwise convolutions")
        conv, norm, _, shuffle, point, point_norm = block.conv
        depthwise, hidden, order = self.multiplying(block, conv, norm, shuffle)
        linear = self.pointwise(point, point_norm, order, nn.Identity(), len(order) // conv.in_channels)
        sizes = [_LITE, conv.in_channels, point.out_channels, conv.stride[0], int(block.skip)]
        return [*sizes, hidden, 0, depthwise, 0, *_NO_LINEAR, *linear]

    def block(self, block: Any) -> list[int]:
        self.need(not block.before_skip, block, "blocks with the residual before the bridge")
        point1, norm1, shuffle1 = block.conv1
        conv, norm = block.conv2
        point2, norm2, shuffle2 = block.conv3
        self.check_depthwise(block, conv)
        self.need(conv.stride == (1, 1), block, "blocks with stride 1")
        channels = conv.out_channels
        linear1 = self.pointwise(point1, norm1, range(point1.in_channels), shuffle1)
        depthwise = self.pack.depthwise(*fold(conv, norm), padded_slots(channels))
        linear2 = self.pointwise(point2, norm2, range(channels), shuffle2)
        sizes = [_BLOCK, point1.in_channels, point2.out_channels, 1, int(block.skip)]
        return [*sizes, padded(channels), 0, depthwise, 0, *linear1, *linear2]

    def down(self, block: Any) -> list[int]:
        self.need(not block.skip, block, "downsample blocks without an outer residual")
        self.need(len(block.conv1) == 3 and len(block.conv3) == 3, block, "3x3 depthwise convolutions")
        conv1, norm1, shuffle1 = block.conv1
        conv3, norm3, shuffle3 = block.conv3
        depthwise1, hidden1, order1 = self.multiplying(block, conv1, norm1, shuffle1)
        linear1 = self.pointwise(
            block.conv2[0], block.conv2[1], order1, nn.Identity(), len(order1) // conv1.in_channels
        )
        depthwise2, hidden2, order3 = self.multiplying(block, conv3, norm3, shuffle3)
        linear2 = self.pointwise(
            block.conv4[0], block.conv4[1], order3, nn.Identity(), len(order3) // conv3.in_channels
        )
        self.need(conv3.stride == (1, 1), block, "a second depthwise convolution of stride 1")
        sizes = [_DOWN, conv1.in_channels, conv3.in_channels, conv1.stride[0], 0]
        return [*sizes, hidden1, hidden2, depthwise1, depthwise2, *linear1, *linear2]

    def check_block(self, block: Any) -> None:
        second = block.act2 if isinstance(block, MobileFormerBlock) else block.act3
        last = block.act3 if isinstance(block, MobileFormerBlock) else block.act4
        for act in (block.act1, second):
            self.need(act.num_functions == 2, act, "dynamic ReLUs of two functions")
        self.need(last.num_functions == -1, last, "blocks without squeeze-and-excitation")
        self.need(block.token_id >= 0, block, "dynamic ReLUs with the coefficients of one token")

    def check_depthwise(self, block: nn.Module, conv: Any) -> None:
        fits = isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.groups == conv.in_channels
        self.need(
            fits and conv.stride in ((1, 1), (2, 2)), block, "3x3 depthwise convolutions of stride 1 or 2"
        )

    def multiplying(
        self, block: nn.Module, conv: nn.Conv2d, norm: nn.BatchNorm2d, shuffle: nn.Module
    ) -> tuple[int, int, list[int]]:
        """A depthwise convolution that makes several channels of each: its offset, its padded channels, and
        the numbers, after the shuffle, of its outputs in the order of memory."""
        self.check_depthwise(block, conv)
        inputs, times = conv.in_channels, conv.out_channels // conv.in_channels
        offset = self.pack.depthwise(*fold(conv, norm), padded_slots(inputs, _made(conv)))
        return offset, times * padded(inputs), _numbers(conv, shuffle)

    def pointwise(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d, columns: Any, shuffle: nn.Module, runs: int = 1
    ) -> list[int]:
        """A 1x1 convolution; its inputs lie in memory in the order of `columns`, in so many runs;
        its outputs are shuffled."""
        weight, bias = fold(conv, norm)
        rows = shuffled(shuffle, conv.out_channels)
        matrix = dense(weight, conv.groups)[rows][:, list(columns)]
        return self.pack.linear(matrix, bias[rows], runs=runs)

    # --- tokens ------------------------------------------------------------------------------------------

    def hypers(self, block: Any) -> list[int]:
        """squeeze, slopes1, slopes2"""
        modules: list[Any]
        if isinstance(block, MobileFormerBlock):
            conv: Any = block.conv2[0]
            channels = conv.out_channels
            modules = [block.hyper1, block.hyper2]
            slots = 2 * [padded_slots(channels)]
        else:
            modules = [block.hyper1, block.hyper3]
            convs = [(layers[0], layers[2]) for layers in (block.conv1, block.conv3)]
            slots = [padded_slots(conv.in_channels, _numbers(conv, shuffle)) for conv, shuffle in convs]
        fields = self.side_by_side([(module.hyper[0], 1.0) for module in modules])
        for module, places in zip(modules, slots, strict=True):
            layer = module.hyper[2]
            weight, bias = padded_rows(layer.weight).double(), layer.bias.double()
            half = layer.out_features // 2
            both = [*places, *(-1 if place < 0 else place + half for place in places)]
            fields += self.pack.linear(spread(weight, both), spread(bias, both))
        return fields

    def token_step(
        self,
        bridge: Any,
        block: Any,
        next_bridge: Any,
    ) -> list[int]:
        """A PlanTokens: what `bridge` and `block` do to the tokens, and what the tokens make for the pass."""
        if bridge is None:
            fields = [0, 0, *_NO_LINEAR, 0]
        else:
            self.check_bridge(bridge)
            project = self.pack.linear(bridge.proj.weight, bridge.proj.bias)
            fields = [bridge.channels, int(hasattr(bridge, "alpha")), *project, self.norm(bridge.layer_norm)]
        if block is None:
            fields += [0] * 20 + 3 * _NO_LINEAR
        else:
            self.check_block(block)
            fields += self.former(block.global_block) + self.hypers(block)
        made: list[tuple[nn.Linear, float]] = []
        if block is not None:
            scatter = block.global_local
            self.check_scatter(scatter)
            made += [(scatter.k, (scatter.channels // self.heads) ** -0.5), (scatter.proj, 1.0)]
        if next_bridge is not None:
            self.check_bridge(next_bridge)
            made += [(next_bridge.q, (next_bridge.channels // self.heads) ** -0.5)]
            if hasattr(next_bridge, "alpha"):
                made += [(next_bridge.alpha[0], 1.0)]
        return fields + (self.side_by_side(made) if made else _NO_LINEAR)

    def side_by_side(self, layers: list[tuple[Any, float]]) -> list[int]:
        """Layers of the same input as one matrix, each with padded outputs and multiplied by its factor."""
        weights = [padded_rows(layer.weight.double().t() * by).t() for layer, by in layers]
        return self.pack.linear(
            torch.cat(weights), torch.cat([padded_rows(layer.bias.double() * by) for layer, by in layers])
        )

    def former(self, former: Any) -> list[int]:
        self.need(hasattr(former, "q") and not hasattr(former, "token_mlp"), former, "mixing by attention")
        self.need(not hasattr(former, "alpha"), former, "Formers without a gate")
        self.former_heads = self.former_heads or former.num_heads
        self.need(former.num_heads == self.former_heads, former, "one number of heads")
        fields = [1, *self.pack.linear(former.q.weight, former.q.bias)]
        fields += self.pack.linear(former.channel_mlp.weight, former.channel_mlp.bias)
        fields += [self.norm(former.layer_norm)]
        if not hasattr(former, "ffn"):
            return [*fields, 0, *_NO_LINEAR, *_NO_LINEAR, 0]
        first, last = former.ffn[0], former.ffn[2]
        fields += [1, *self.pack.linear(first.weight, first.bias)]
        fields += self.pack.linear(padded_rows(last.weight), last.bias)
        return [*fields, self.norm(former.ffn_norm)]

    def check_bridge(self, bridge: Any) -> None:
        self.need(hasattr(bridge, "q") and not hasattr(bridge, "mlp"), bridge, "mixing by attention")
        self.need(not hasattr(bridge, "k"), bridge, "bridges without projections of the map")
        self.check_heads(bridge)

    def check_scatter(self, scatter: Any) -> None:
        self.need(hasattr(scatter, "k") and not hasattr(scatter, "mlp"), scatter, "mixing by attention")
        self.need(not hasattr(scatter, "q"), scatter, "bridges without projections of the map")
        self.need(not hasattr(scatter, "alpha"), scatter, "a Mobile <- Former without a gate")
        self.check_heads(scatter)

    def check_heads(self, bridge: Any) -> None:
        self.heads = self.heads or bridge.num_heads
        self.need(bridge.num_heads == self.heads, bridge, "one number of heads")

    def norm(self, norm: nn.LayerNorm) -> int:
        self.need(norm.eps == 1e-5, norm, "layer norms with eps 1e-5")
        return self.pack.add(torch.cat([padded_rows(norm.weight), padded_rows(norm.bias)]))

    # --- head --------------------------------------------------------------------------------------------

    def head(self, head: Any) -> list[int]:
        """head, fc, classifier"""
        shuffle, conv, norm = head.conv
        act = head.act
        self.need(act.num_functions == 0, act, "a relu6 in the head")
        self.need(head.class_tokens != 0, head, "class tokens that are joined, not averaged,")
        weight, bias = fold(conv, norm)
        order = shuffled(shuffle, conv.in_channels)
        place = sorted(range(len(order)), key=order.__getitem__)  # the column that reads each channel
        fields = self.pack.linear(dense(weight, conv.groups)[:, place], bias)
        linear, norm1d, _ = head.fc
        scale, shift = affine(norm1d)
        weight = linear.weight.double() * scale[:, None]
        pooled = padded_rows(weight[:, : conv.out_channels])
        weight = torch.cat([pooled, weight[:, conv.out_channels :]], 1)
        fields += self.pack.linear(weight, linear.bias.double() * scale + shift)
        last = head.classifier[1]
        return fields + self.pack.linear(padded_rows(last.weight), last.bias)


def _made(conv: nn.Conv2d) -> list[int]:
    """The outputs of a depthwise convolution in the order of memory: the first that each input makes, then
    the second, ..."""
    times = conv.out_channels // conv.in_channels
    return [i * times + j for j in range(times) for i in range(conv.in_channels)]


def _numbers(conv: nn.Conv2d, shuffle: nn.Module) -> list[int]:
    """The same, each by its number after the shuffle."""
    number = {old: new for new, old in enumerate(shuffled(shuffle, conv.out_channels))}
    return [number[old] for old in _made(conv)]

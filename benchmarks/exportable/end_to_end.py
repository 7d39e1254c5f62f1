"""The end-to-end detector of Mobile-Former."""

import copy

import torch
from torch import Tensor, nn

from mfkernels.models.end_to_end import EndToEndMobileFormer
from mfkernels.nn.detection_block import DetectionBlock
from mfkernels.nn.encoder_layer import EncoderLayer
from mfkernels.nn.up_conv import UpConv

from .layers import by_head, folded, linear, scaled, sizes
from .mobile_former import DynamicSlopes, ToFormer, ToMobile, dynamic_relu, exportable_block


class ExportableEndToEnd(nn.Module):
    """A detector of the paper's kind; tokens, queries and positions are (B, T, d)."""

    def __init__(self, model: EndToEndMobileFormer) -> None:
        super().__init__()
        network = model.backbone.network
        self.tokens = nn.Parameter(network.tokens.weight.detach().clone())
        self.stem = folded(network.stem)
        self.blocks = nn.ModuleDict(
            {str(i): exportable_block(block) for i, block in enumerate(network.features)}
        )
        # The last map of each size, the coarsest first.
        self.kept = [stage.name.removeprefix("features.") for stage in network.feature_stages][::-1]
        self.content = nn.Parameter(model.content.detach().clone())
        self.position = nn.Parameter(model.position.detach().clone())
        self.projection = copy.deepcopy(model.projection)
        self.up_convs = nn.ModuleList(_UpConv(up_conv) for up_conv in model.up_convs)
        self.scales = nn.ModuleList(
            nn.ModuleList(_Block(block) for block in blocks) for blocks in model.scales
        )
        self.classify, self.locate = copy.deepcopy(model.classify), copy.deepcopy(model.locate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, maps = int(x.shape[0]), {}
        tokens = self.tokens.expand(batch, -1, -1)
        x = self.stem(x)
        for name, block in self.blocks.items():
            x, tokens = block(x, tokens)
            maps[name] = x
        x = self.projection(maps[self.kept[0]])
        queries, position = self.content.expand(batch, -1, -1), self.position.expand(batch, -1, -1)
        for scale, blocks in enumerate(self.scales):
            if scale > 0:
                x = self.up_convs[scale - 1](x, maps[self.kept[scale]])
            for block in blocks:
                x, queries, position = block(x, queries, position)
        return self.classify(queries), self.locate(queries)


class _UpConv(nn.Module):
    def __init__(self, up_conv: UpConv) -> None:
        super().__init__()
        self.lateral = copy.deepcopy(up_conv.lateral)
        self.convs = folded([*up_conv.conv1, *up_conv.conv2])

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        height, width = sizes(finer)[2:]
        up = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.convs(up[:, :, :height, :width] + self.lateral(finer))


class _Block(nn.Module):
    def __init__(self, block: DetectionBlock) -> None:
        super().__init__()
        if not block.mobile_first or block.adapt_position is None or block.hyper.token_id != 0:
            raise ValueError("exportable: a detector's block must be of the kind that create_model makes")
        self.pixels = None if block.pixel_block is None else _Encoder(block.pixel_block)
        self.conv1, self.conv2 = folded(block.conv1), folded(block.conv2)
        self.hyper = DynamicSlopes(block.hyper)
        self.to_mobile, self.to_former = ToMobile(block.global_local), ToFormer(block.local_global)
        self.adapt = copy.deepcopy(block.adapt_position.g)
        self.former = _Encoder(block.global_block)

    def forward(self, x: Tensor, queries: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.pixels is not None:
            batch, channels, height, width = sizes(x)
            pixels = self.pixels(x.reshape(batch, channels, height * width).transpose(1, 2))
            x = pixels.transpose(1, 2).reshape(batch, channels, height, width)
        hidden = dynamic_relu(self.conv1(x), *self.hyper(queries[:, 0]))
        x = self.to_mobile(self.conv2(hidden) + x, queries)
        position = position + self.adapt(queries)
        return x, self.former(self.to_former(x, queries, position), position), position


class _Encoder(nn.Module):
    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        attention = layer.attention
        self.heads = attention.num_heads
        query, key, value = (
            linear(weight, bias)
            for weight, bias in zip(
                attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
            )
        )
        self.query = scaled(query, (query.out_features // self.heads) ** -0.5)
        self.key, self.value, self.proj = key, value, linear(*attention.out_proj.parameters())
        self.norm1, self.norm2 = copy.deepcopy(layer.layer_norm), copy.deepcopy(layer.ffn_norm)
        self.ffn = copy.deepcopy(layer.ffn)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        at = x if position is None else x + position
        query, key, value = (
            by_head(layer(of), self.heads)
            for layer, of in ((self.query, at), (self.key, at), (self.value, x))
        )
        out = torch.softmax(query @ key.transpose(2, 3), -1) @ value
        x = self.norm1(x + self.proj(out.transpose(1, 2).reshape(sizes(x))))
        return self.norm2(x + self.ffn(x))

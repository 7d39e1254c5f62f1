from torch import Tensor, nn

from .adapt_position import AdaptPosition
from .depthwise import depthwise_layers, pointwise_layers
from .dynamic_relu import DynamicReLU
from .encoder_layer import EncoderLayer
from .former_to_mobile_attention import FormerToMobile
from .mobile_to_former_attention import MobileToFormer
from .padding import Padding, hide, normalize_inside
from .token_hyper import HyperNetwork


class DetectionBlock(nn.Module):
    """Run one block of the end-to-end detector's head.

    It has a lite bottleneck (Mobile), object queries (Former), and two bridges.

    Map and queries have C channels. The queries' positions are added for the queries of Mobile -> Former, and
    for queries and keys of Former. Mobile is a depthwise convolution to `expansion` times the channels, a
    dynamic ReLU, and a 1x1 convolution; with `mobile_attention` an `EncoderLayer` over the pixels, without
    positions, comes before it.

    The defaults are what fits the paper's counts of parameters and of multiply-adds; it states none of them.

    Args:
        channels: C.
        queries: how many.
        expansion: of the bottleneck.
        num_heads: of the attention among queries, and among pixels.
        bridge_heads: of both bridges, as in the released blocks.
        token_id: the query whose coefficients the dynamic ReLU takes.
        hyper_reduction: the hyper network has C / hyper_reduction hidden units.
        gate: of Mobile -> Former, see `MobileToFormer`.
        mobile_attention: attention among the pixels; the blocks that the paper marks with a dagger.
        adapt_position: equation 4, before the positions are used; without it they are the same in all blocks.
        mobile_first: Mobile and its bridge come first, so that the queries read the block's own map, and all
            that a head computes is read. Otherwise the order of the backbone's blocks: the queries read the
            map that comes in, dynamic coefficients come from the updated queries, and nobody reads the map of
            a head's last block, whose parameters then have no gradients.
        dropout: see `EncoderLayer`.

    Inputs:
        x (B, C, H, W), queries and their positions, both (queries, B, C). `padding`: None, or what of the map
        is padding. There `x` must be zero, and what comes out is.

    Returns:
        All three, updated.

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    Source: Chen et al., Mobile-Former, CVPR 2022, section 4 and equation 4; no released code.
    """

    def __init__(
        self,
        channels: int,
        *,
        queries: int = 100,
        expansion: int = 6,
        num_heads: int = 8,
        bridge_heads: int = 2,
        token_id: int = 0,
        hyper_reduction: int = 4,
        gate: bool = True,
        mobile_attention: bool = False,
        adapt_position: bool = True,
        mobile_first: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= token_id < queries:
            raise ValueError(f"DetectionBlock: token_id must be from 0 to {queries - 1}, got {token_id}")
        hidden = channels * expansion
        self.mobile_first = mobile_first
        self.adapt_position = AdaptPosition(channels) if adapt_position else None
        self.pixel_block = (
            EncoderLayer(channels, num_heads=num_heads, dropout=dropout) if mobile_attention else None
        )
        self.conv1 = nn.Sequential(*depthwise_layers(channels, hidden, 3, 1, "dw"))
        self.act = DynamicReLU(2)
        self.hyper = HyperNetwork(channels, 2 * hidden, token_id=token_id, reduction=hyper_reduction)
        self.conv2 = nn.Sequential(*pointwise_layers(hidden, channels, 1))
        self.global_local = FormerToMobile(channels, channels, token_num=queries, num_heads=bridge_heads)
        self.local_global = MobileToFormer(channels, channels, num_heads=bridge_heads, gate=gate)
        self.global_block = EncoderLayer(channels, num_heads=num_heads, dropout=dropout)

    def forward(
        self, x: Tensor, queries: Tensor, position: Tensor, padding: Padding | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.mobile_first:
            x = self._mobile(x, queries, padding)
            position = self._adapted(position, queries)
        queries_read, _ = self.local_global(x, queries, False, position, padding)
        queries = self.global_block(queries_read, position)
        if not self.mobile_first:
            x = self._mobile(x, queries, padding)
            position = self._adapted(position, queries)
        return x, queries, position

    def _adapted(self, position: Tensor, queries: Tensor) -> Tensor:
        return position if self.adapt_position is None else self.adapt_position(position, queries)

    def _mobile(self, x: Tensor, queries: Tensor, padding: Padding | None) -> Tensor:
        if self.pixel_block is not None:
            outside = None if padding is None else ~padding.inside(x).flatten(1)
            pixels = self.pixel_block(x.flatten(2).permute(2, 0, 1), outside=outside)
            x = hide(pixels.permute(1, 2, 0).reshape(x.shape), padding)
        (depthwise, norm1), (pointwise, norm2) = self.conv1, self.conv2
        out = normalize_inside(norm1, depthwise(x), padding)
        out = self.act(out, self.hyper(queries))
        out = normalize_inside(norm2, pointwise(out), padding) + x
        return hide(self.global_local(out, queries), padding)

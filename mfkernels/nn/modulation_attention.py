from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..checks import check_tensor
from .conv_bn import ConvBN
from .inputs import check_channels
from .replacement import Replacement


class SingleHeadModulationAttention(Replacement):
    """Attention among all pixels with one head, its result multiplied by a gate: iFormer's SHMA.

    Args:
        channels: C.
        reduction: R; queries and keys have C // R channels.
        ratio: values and gate have int(ratio C) channels.
        num_heads: only changes the logits' factor, (C // R // num_heads) ** -0.5, as in the released code.
        window_size: None, or attention within windows of that many pixels a side. Maps that they do not
            divide are padded with zeros at the right and the bottom; these take part as keys.
        form: "released": sigmoid of the values before the attention; "paper": of its result.

    Inputs:
        x (B, C, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        TypeError, ValueError: an argument or input that does not fit, named.

    State: the released `SHMA`.
    Source: Zheng, iFormer, ICLR 2025, section 3.3 and equation 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 2,
        ratio: float = 1.0,
        num_heads: int = 1,
        window_size: int | None = None,
        form: str = "released",
    ) -> None:
        super().__init__()
        if form not in ("released", "paper"):
            raise ValueError(
                f"SingleHeadModulationAttention: form must be 'released' or 'paper', got {form!r}"
            )
        self.channels, self.window_size, self.form = channels, window_size, form
        depth, width = channels // reduction, int(ratio * channels)
        self.scale = (depth // num_heads) ** -0.5
        self.q = ConvBN(channels, depth)
        self.k = ConvBN(channels, depth)
        self.proj = ConvBN(width, channels)
        self.v_gate = ConvBN(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("SingleHeadModulationAttention", "x", x, "B C H W")
        check_channels("SingleHeadModulationAttention", x, self.channels)
        height, width = x.shape[2:]
        if self.window_size is not None:
            x = F.pad(x, (0, -width % self.window_size, 0, -height % self.window_size))
        v, gate = self.v_gate(x).chunk(2, dim=1)
        y = ops.modulation_attention(self.q(x), self.k(x), v, gate, self.scale, self.form, self.window_size)
        return self.proj(y)[:, :, :height, :width]

    def extra_repr(self) -> str:
        return f"{self.channels}, window_size={self.window_size}, form={self.form!r}"

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .batch_norm import normalize


class Padding:
    """Know which pixels of a batch of padded images, and of maps made of them, are of the images.

    A convolution with padding of its own gives the same for an image in every batch if the pixels around the
    image are zero, as `hide` makes them. Maps are told apart by their size: that of the batch, halved and
    rounded up as often as a network does.

    Args:
        mask: (B, H, W), bool, True where there is no image. Images lie in the top left corner.

    Raises:
        TypeError: `mask` is no bool tensor.
        ValueError: it has not three dimensions, an image has no pixel, or there is padding elsewhere than at
            the bottom and on the right.
    """

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"Padding: mask must be a bool tensor, got {found}")
        if mask.dim() != 3:
            raise ValueError(f"Padding: mask must have shape (B, H, W), got {tuple(mask.shape)}")
        height, width = mask.shape[1:]
        image = ~mask
        sizes = torch.stack([image[:, :, :1].sum((1, 2)), image[:, :1].sum((1, 2))], 1)  # (B, 2)
        if not torch.equal(image, _inside(sizes, height, width)) or (sizes < 1).any():
            raise ValueError(
                "Padding: mask must be True at the bottom and on the right of images alone, and False for a "
                "pixel of each at least"
            )
        self._sizes = {(h, w): of_maps for h, w, of_maps in _halved(height, width, sizes)}

    def inside(self, x: Tensor) -> Tensor:
        """(B, 1, H, W), bool: which pixels of the map (B, C, H, W) are of the images."""
        height, width = x.shape[2:]
        return _inside(self._sizes[height, width], height, width)[:, None]

    def hide(self, x: Tensor) -> Tensor:
        """`x` with zeros in the padding."""
        return x.masked_fill(~self.inside(x), 0.0)

    def halve(self, x: Tensor) -> Tensor:
        """Pool each image's part of `x` to half its size, rounded up, as `F.adaptive_avg_pool2d` does.

        The bins depend on the size. The rest of the result is zero.
        """
        height, width = x.shape[2:]
        sizes = self._sizes[height, width]
        rows, columns = _bins(sizes[:, 0], height, x), _bins(sizes[:, 1], width, x)
        return rows[:, None] @ x @ columns[:, None].transpose(2, 3)


def hide(x: Tensor, padding: Padding | None) -> Tensor:
    """`x` with zeros in the padding; `x` itself where there is none."""
    return x if padding is None else padding.hide(x)


def normalize_inside(norm: nn.Module, x: Tensor, padding: Padding | None) -> Tensor:
    """`norm(x)`, which in train mode measures the images' pixels alone and leaves zeros in the padding."""
    if padding is None or not norm.training:
        return normalize(norm, x)
    inside, pixels = padding.inside(x)[:, 0], x.permute(0, 2, 3, 1)  # (B, H, W) and (B, H, W, C)
    normal = norm(pixels[inside][:, :, None, None])[:, :, 0, 0]
    out = normal.new_zeros(pixels.shape)
    out[inside] = normal
    return out.permute(0, 3, 1, 2)


def _halved(height: int, width: int, sizes: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Return the size of the batch and the images' sizes, level by level.

    Each level is half of the one before, down to one pixel.
    """
    while True:
        yield height, width, sizes
        if max(height, width) <= 1:
            return
        height, width, sizes = (height + 1) // 2, (width + 1) // 2, (sizes + 1) // 2


def _inside(sizes: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width), bool, True in the top left `sizes`, (B, 2)."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None]


def _bins(sizes: Tensor, inputs: int, like: Tensor) -> Tensor:
    """Return the weights with which an axis of `sizes` (B) is pooled to half of it.

    Their shape is (B, ceil(inputs / 2), inputs).
    """
    sizes, halves = sizes[:, None, None], (sizes[:, None, None] + 1) // 2
    into = torch.arange((inputs + 1) // 2, device=sizes.device)[:, None]
    out_of = torch.arange(inputs, device=sizes.device)
    first, after = into * sizes // halves, ((into + 1) * sizes + halves - 1) // halves
    taken = (out_of >= first) & (out_of < after) & (into < halves)
    return taken.to(like.dtype) / (after - first)

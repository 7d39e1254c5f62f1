"""The command `mfkernels attention`: what a network looks at in a photo, as figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from .attention import AttentionMap, attention_maps
from .demo import MEAN, STD, open_photo, prepare
from .models import create_model

SIZE = 224  # side of the photo's middle that the network sees, in pixels
_CELL = 96  # side of a picture in a figure
_LOOKING = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))  # pixels, as shares of a side


class _Row(NamedTuple):
    """Pictures beside each other, (H, W) each, in 0..1; and what stands before them."""

    label: str
    pictures: Sequence[Tensor]


def run(name: str, photo: Path, checkpoint: Path | None, output: Path) -> list[Path]:
    """Write figures of where a network looks in the middle of a photo.

    - of Mobile-Formers `bridge.png`: a row for each block and head, a column for each token; Mobile -> Former
      on the left, Mobile <- Former on the right;
    - of Mobile-Formers and DMF `mobile_to_former.png`, on the photo: the pixels that each token looks at, the
      largest weight of a picture in red;
    - of Mobile-Formers `former_to_mobile.png`, on the photo: the share, 0 to 1, of each token in what a pixel
      is given;
    - of DMF `kernels.png`: the scores of each dynamic convolution's kernels;
    - of iFormers `pixels.png`, on the photo: the pixels that each of five pixels, marked, looks at.

    Args:
        name: one of `mfkernels.models.list_models()`, without windows.
        photo: its path.
        checkpoint: path of weights; None for random ones, whose figures mean nothing.
        output: folder of the figures; made if missing.

    Returns:
        The paths of the figures.

    Raises:
        OSError: the photo or the checkpoint cannot be read, or the folder cannot be written.
        ValueError: the checkpoint does not fit.

    Source: Chen et al., Mobile-Former, CVPR 2022, supplement, figures 2 to 5.
    """
    torch.manual_seed(0)
    x = prepare(open_photo(photo), SIZE)
    model = create_model(name, checkpoint=checkpoint).eval()
    maps = attention_maps(model, x)
    output.mkdir(parents=True, exist_ok=True)
    middle = (x[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)
    made = {file: figure for file, figure in _figures(maps, middle).items() if figure is not None}
    for file, figure in made.items():
        figure.savefig(output / file, dpi=100)
    paths = [output / file for file in made]
    print(f"{name}, {checkpoint or 'random weights, whose figures mean nothing'}")
    print(f"written: {', '.join(map(str, paths))}")
    return paths


def _figures(maps: dict[str, AttentionMap], photo: Tensor) -> dict[str, Figure | None]:
    to_former = _by_head(maps, "mobile_to_former", lambda w: w / w.amax((-2, -1), keepdim=True))
    from_former = _by_head(maps, "former_to_mobile", lambda w: w)
    looking = [_of_pixels(name, found.weights[0]) for name, found in maps.items() if found.kind == "pixels"]
    tokens = [f"token {i + 1}" for i in range(len((to_former or [_Row("", ())])[0].pictures))]
    places = [f"pixel {i + 1}" for i in range(len(_LOOKING))]
    return {
        "bridge.png": _bridge(to_former, from_former, tokens),
        "mobile_to_former.png": _table(to_former, tokens, photo),
        "former_to_mobile.png": _table(from_former, tokens, photo),
        "pixels.png": _table(looking, places, photo, marks=_LOOKING),
        "kernels.png": _kernels({n: m.weights[0] for n, m in maps.items() if m.kind == "kernels"}),
    }


def _by_head(maps: dict[str, AttentionMap], kind: str, normal: Callable[[Tensor], Tensor]) -> list[_Row]:
    """Return a row for each part and head: the pictures of its tokens."""
    return [
        _Row(f"{_short(name)}, head {head + 1}", list(normal(weights)))
        for name, found in maps.items()
        if found.kind == kind
        for head, weights in enumerate(found.weights[0])
    ]


def _of_pixels(name: str, weights: Tensor) -> _Row:
    """Return what the pixels of `_LOOKING` look at; weights (N, H, W)."""
    height, width = weights.shape[1:]
    places = [int(down * height) * width + int(right * width) for down, right in _LOOKING]
    return _Row(_short(name), [weights[place] / weights[place].max() for place in places])


def _short(name: str) -> str:
    """Return the block's name, without that of its part."""
    parts = name.split(".")
    return ".".join(parts[: 1 + max((i for i, part in enumerate(parts) if part.isdigit()), default=0)])


def _bridge(to_former: list[_Row], from_former: list[_Row], tokens: list[str]) -> Figure | None:
    """Both directions beside each other; the last Mobile -> Former has no way back, and is left out."""
    back = {row.label: row.pictures for row in from_former}
    rows = [_Row(label, [*pictures, *back[label]]) for label, pictures in to_former if label in back]
    titles = [f"-> Former\n{title}" for title in tokens] + [f"<- Former\n{title}" for title in tokens]
    return _table(rows, titles)


def _table(
    rows: list[_Row],
    titles: list[str],
    photo: Tensor | None = None,
    marks: Sequence[tuple[float, float]] = (),
) -> Figure | None:
    """Pictures in rows and columns, over the photo (3, H, W) if there is one; None without rows."""
    if not rows:
        return None
    under = None if photo is None else _sized(photo, "bilinear").permute(1, 2, 0)
    strips = [torch.cat([_cell(picture, under) for picture in row.pictures], 1) for row in rows]
    height, width = len(rows), len(titles)
    figure = Figure(figsize=(2 + 0.9 * width, 0.8 + 0.9 * height), layout="constrained")
    axes = figure.subplots()
    axes.imshow(torch.cat(strips, 0).numpy(), interpolation="nearest")
    axes.set_xticks([_CELL * (i + 0.5) for i in range(width)], titles, fontsize=8)
    axes.set_yticks([_CELL * (i + 0.5) for i in range(height)], [row.label for row in rows], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for column, (down, right) in enumerate(marks):
        for row in range(height):
            axes.plot(_CELL * (column + right), _CELL * (row + down), "w+", markersize=8)
    return figure


def _cell(picture: Tensor, under: Tensor | None) -> Tensor:
    """Return a picture (H, W) in colours, (_CELL, _CELL, 3), with a border.

    Half of it is `under` where that is given.
    """
    values = _sized(picture[None], "nearest" if under is None else "bilinear")[0].clamp(0, 1)
    coloured = torch.from_numpy(colormaps["jet"](values.numpy())[..., :3].astype(np.float32))
    if under is not None:
        coloured = (coloured + under) / 2
    return F.pad(coloured[1:-1, 1:-1], (0, 0, 1, 1, 1, 1), value=1.0)


def _sized(picture: Tensor, mode: str) -> Tensor:
    return F.interpolate(picture[None].float(), (_CELL, _CELL), mode=mode)[0]


def _kernels(scores: dict[str, Tensor]) -> Figure | None:
    """Scores (K) of all convolutions, one a row; None without any."""
    if not scores:
        return None
    table = np.full((len(scores), max(map(len, scores.values()))), np.nan)
    for row, values in zip(table, scores.values(), strict=True):
        row[: len(values)] = values.numpy()
    figure = Figure(figsize=(6, 1 + 0.2 * len(table)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    labels = [name.removesuffix(".Kernel_Attention") for name in scores]
    axes.set_yticks(range(len(table)), labels, fontsize=7)
    axes.set_xlabel("kernel")
    figure.colorbar(drawn, label="score")
    return figure

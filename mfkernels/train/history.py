"""Record a training epoch by epoch.

The record is a CSV file, curves as PNG, and files for TensorBoard where that is installed.
"""

import csv
from pathlib import Path
from typing import Any

# File names in a training's folder.
TABLE, CURVES = "history.csv", "curves.png"
_NAMES = {"top1": "top-1", "top5": "top-5"}
_PERCENT = ("top1", "top5", "AP", "AP50", "AP75", "APs", "APm", "APl")
# Of each curve: the title of its axis, and the columns that it shows.
Panels = tuple[tuple[str, tuple[str, ...]], ...]


def write(folder: Path, rows: list[dict[str, float]], panels: Panels) -> None:
    """Write the table and the curves of all epochs so far.

    Args:
        folder: of the training.
        rows: one an epoch, the same names in all.
        panels: what the curves show.
    """
    with open(folder / TABLE, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    _curves(rows, panels, folder / CURVES)
    _tensorboard(folder, rows[-1])


def line(row: dict[str, float]) -> str:
    """Return an epoch's numbers in one line."""
    said = [f"{_NAMES.get(name, name)} {row[name]:.2f} %" for name in row if name in _PERCENT]
    return (
        f"epoch {row['epoch']:.0f}: loss {row['loss']:.4f}, {', '.join(said)}, "
        f"{row['images_per_second']:.0f} images/s, {row['unreadable']:.0f} unreadable"
    )


def _curves(rows: list[dict[str, float]], panels: Panels, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            axes.plot(epochs, [row[name] for row in rows], marker="o", markersize=2, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _tensorboard(folder: Path, row: dict[str, float]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    writer: Any = SummaryWriter(str(folder))
    with writer:
        for name, value in row.items():
            writer.add_scalar(name, value, int(row["epoch"]))

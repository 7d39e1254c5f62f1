"""What a training did, epoch by epoch: a CSV file, curves as PNG, and files for TensorBoard where that is
installed."""

import csv
from pathlib import Path
from typing import Any

# File names in a training's folder.
TABLE, CURVES = "history.csv", "curves.png"
_PANELS = (("loss", ("loss",)), ("accuracy, %", ("top1", "top5")), ("learning rate", ("lr",)))


def write(folder: Path, rows: list[dict[str, float]]) -> None:
    """Write the table and the curves of all epochs so far.

    Args:
        folder: of the training.
        rows: one an epoch, the same names in all.
    """
    with open(folder / TABLE, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    _curves(rows, folder / CURVES)
    _tensorboard(folder, rows[-1])


def line(row: dict[str, float]) -> str:
    """Return an epoch's numbers in one line."""
    return (
        f"epoch {row['epoch']:.0f}: loss {row['loss']:.4f}, top-1 {row['top1']:.2f} %, "
        f"top-5 {row['top5']:.2f} %, {row['images_per_second']:.0f} images/s, "
        f"{row['unreadable']:.0f} unreadable"
    )


def _curves(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, (title, names) in zip(figure.subplots(1, 3), _PANELS, strict=True):
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

"""The main job, `mfkernels demo`: a network on a photo, plain PyTorch against mfkernels."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import cbook
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from . import progress
from .backends import use_backend
from .bench.run import machine, randomise
from .deploy import deploy
from .models import create_model

SIZES = (224, 640)
SECONDS = 15.0  # of measurement for each size
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in the released recipes


def run(name: str, image: Path | None, checkpoint: Path | None, output: Path) -> list[dict[str, Any]]:
    """Run a network on a photo at every size of `SIZES`, in plain PyTorch and deployed.

    Print a table, and write JSON and PNG.

    Args:
        name: one of `mfkernels.models.list_models()`.
        image: path of a photo, None for matplotlib's sample photo.
        checkpoint: path of released weights, None for random ones.
        output: folder for demo.json and demo.png; made if missing.

    Returns:
        One row a size: latencies in milliseconds (medians), speed-up, largest absolute difference of the
        logits, the same relative to the largest logit, and both top-5 lists.

    Raises:
        OSError: the photo or the checkpoint cannot be read, or the folder cannot be written.
        ValueError: the checkpoint does not fit.
    """
    photo = open_photo(image)
    model = create_model(name, checkpoint=checkpoint)
    if checkpoint is None:
        square = prepare(photo, 224)
        randomise(model, torch.cat([square, square.flip(-1), square.flip(-2), square.roll(50, -1)]))
    model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            deployed = deploy(model)
            rows = [_compare(model, deployed, prepare(photo, size), size) for size in SIZES]
    finally:
        torch.set_num_threads(threads)
    setting = {
        "model": name,
        "image": str(image or "matplotlib's grace_hopper.jpg"),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "threads": 1,
        "batch": 1,
        **machine(),
    }
    print(_table(setting, rows))
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")
    _chart(setting, rows).savefig(output / "demo.png", dpi=150)
    print(f"written: {output / 'demo.json'}, {output / 'demo.png'}")
    return rows


def open_photo(image: Path | None) -> Image.Image:
    path = image or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(path) as file:
        return file.convert("RGB")


def prepare(photo: Image.Image, size: int) -> Tensor:
    """Return the photo as the networks take it: (1, 3, size, size), the middle of it, normalised."""
    scale = size / 0.875 / min(photo.size)
    photo = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in photo.size)
    pixels = torch.from_numpy(np.array(photo.crop((left, top, left + size, top + size))))
    normal = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return normal.permute(2, 0, 1)[None].contiguous()


def _compare(model: nn.Module, deployed: nn.Module, x: Tensor, size: int) -> dict[str, Any]:
    def reference() -> Tensor:
        with use_backend("reference"):
            return model(x)

    def ours() -> Tensor:
        return deployed(x)

    expected, got = reference(), ours()
    milliseconds = _interleave([reference, ours], f"{size}x{size}")
    difference = (got - expected).abs().max().item()
    top = [logits[0].topk(min(5, logits.shape[1])).indices.tolist() for logits in (expected, got)]
    return {
        "size": size,
        "reference_ms": milliseconds[0],
        "mfkernels_ms": milliseconds[1],
        "speed_up": milliseconds[0] / milliseconds[1],
        "max_abs_difference": difference,
        "max_rel_difference": difference / expected.abs().max().item(),
        "top5_reference": top[0],
        "top5_mfkernels": top[1],
        "top5_agree": top[0] == top[1],
    }


def _interleave(functions: list[Callable[[], Tensor]], what: str) -> list[float]:
    """Median milliseconds of each function, called in turn, so that a drift of the machine meets all."""
    times: list[list[float]] = [[] for _ in functions]
    if not sys.stderr.isatty():
        progress.show(f"{what}: measuring", keep=True)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS or len(times[0]) < 5:
        for function, of_function in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            of_function.append(1e3 * (time.perf_counter() - begin))
        progress.show(f"{what}: {min(99, int(100 * elapsed / SECONDS))} %, {len(times[0])} rounds")
    progress.show("")
    return [statistics.median(of_function) for of_function in times]


def _table(setting: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    weights = setting["checkpoint"] or "random weights"
    titles = ("size", "PyTorch", "mfkernels", "speed-up", "max abs diff", "max rel diff", "top-5")
    table = [titles] + [
        (
            f"{row['size']}x{row['size']}",
            f"{row['reference_ms']:.1f} ms",
            f"{row['mfkernels_ms']:.1f} ms",
            f"{row['speed_up']:.2f}x",
            f"{row['max_abs_difference']:.1e}",
            f"{row['max_rel_difference']:.1e}",
            "agree" if row["top5_agree"] else "DIFFER",
        )
        for row in rows
    ]
    title = f"{setting['model']}, {weights}, {setting['image']}, one thread, {setting['instruction_set']}"
    return "\n".join([title, *("  ".join(f"{cell:>12}" for cell in line) for line in table)])


def _chart(setting: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for column, label in enumerate(("PyTorch", "mfkernels")):
        heights = [row["mfkernels_ms" if column else "reference_ms"] for row in rows]
        bars = axes.bar([i + 0.4 * column for i in range(len(rows))], heights, 0.38, label=label)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [f"{row['size']}x{row['size']}" for row in rows])
    axes.set_ylabel("latency, ms (one thread, batch 1)")
    axes.set_title(setting["model"])
    axes.legend()
    return figure

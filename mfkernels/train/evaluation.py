"""How often a network is right."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..deploy import deploy
from ..models import create_model
from .data import Batch, EvaluationData, class_names, open_reader
from .processes import Processes
from .recipe import Recipe, load_recipe

CALIBRATION = 64  # images


class Accuracy(NamedTuple):
    """Hold the shares of images, in percent, whose class is the first or one of the first five.

    It also counts the images that could not be read.
    """

    top1: float
    top5: float
    unreadable: int


def accuracy(network: nn.Module, data: Iterable[Batch], processes: Processes, dtype: str) -> Accuracy:
    """Return a network's accuracy on the images of all processes; it is left in the mode that it was in."""
    training = network.training
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    device = processes.device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        for batch in data:
            sums[3] += len(batch.broken)
            if len(batch.files):
                sums[:3] += right(network(batch.images.to(device)), batch.targets.to(device)).cpu()
    network.train(training)
    first, five, count, unreadable = processes.sum(sums).tolist()
    return Accuracy(100 * first / max(count, 1), 100 * five / max(count, 1), int(unreadable))


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """Return of how many samples the class is the first, and one of the first five, and how many there are.

    Args:
        logits: (B, classes).
        targets: (B,).
    """
    best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    return torch.stack(
        [best[:, 0].sum(), best.any(1).sum(), torch.tensor(len(targets), device=logits.device)]
    )


class Comparison(NamedTuple):
    """Compare networks on the same images.

    It has accuracies, images a second, and the share of images, in percent, on which all networks agree.
    """

    accuracies: list[Accuracy]
    images_per_second: list[float]
    agreement: float


def compare(networks: list[Callable[[Tensor], Tensor]], data: Iterable[Batch]) -> Comparison:
    """Return how networks, in eval mode on a CPU, do on the same images."""
    sums = torch.zeros(len(networks), 3, dtype=torch.float64)
    seconds = [0.0] * len(networks)
    agreed, unreadable = 0, 0
    with torch.inference_mode():
        for batch in data:
            unreadable += len(batch.broken)
            if not len(batch.files):
                continue
            said = []
            for index, network in enumerate(networks):
                begin = time.perf_counter()
                logits = network(batch.images)
                seconds[index] += time.perf_counter() - begin
                sums[index] += right(logits, batch.targets)
                said.append(logits.argmax(1))
            agreed += int((torch.stack(said) == said[0]).all(0).sum())
    count = max(float(sums[0, 2]), 1.0)
    accuracies = [Accuracy(100 * float(a) / count, 100 * float(b) / count, unreadable) for a, b, _ in sums]
    return Comparison(accuracies, [count / max(s, 1e-9) for s in seconds], 100 * agreed / count)


def report(
    data: str,
    model: str,
    checkpoint: Path,
    *,
    split: str,
    size: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Return a table of a network's accuracy and speed, as it is and deployed, on the images of a folder.

    Args:
        data: the folder, see `data.open_reader`.
        model: one of `mfkernels.models.list_models()`.
        checkpoint: its weights.
        split: of the folder.
        size: side of the images in pixels.
        batch: images in a batch.
        dtype: of the deployed network, see `deploy`; int8 is calibrated with images of the split "train".

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: no images, or weights of other classes.
    """
    reader = open_reader(data, split=split)
    names = class_names(reader)
    if names is None:
        raise ValueError(f"evaluate: {data} does not name its classes")
    network = create_model(model, num_classes=len(names), checkpoint=checkpoint).eval()
    recipe = load_recipe(model.removesuffix("_faster"), image_size=size, workers=0)
    calibration = _spread_images(data, recipe, batch) if dtype == torch.int8 else None
    deployed = deploy(network, dtype=dtype, calibration=calibration)
    result = compare([network, deployed], EvaluationData(reader, recipe, 0, 1, batch))
    lines = [f"{'':10}{'top-1, %':>10}{'top-5, %':>10}{'images/s':>10}"]
    for name, own, speed in zip(
        ("modules", "deployed"), result.accuracies, result.images_per_second, strict=True
    ):
        lines.append(f"{name:10}{own.top1:10.2f}{own.top5:10.2f}{speed:10.1f}")
    lines.append(f"both say the same of {result.agreement:.2f} % of {len(reader)} images")
    if result.accuracies[0].unreadable:
        lines.append(f"{result.accuracies[0].unreadable} images could not be read")
    return "\n".join(lines)


def _spread_images(data: str, recipe: Recipe, batch: int) -> list[Tensor]:
    """Return some images for a calibration, from all over the split "train"."""
    reader = open_reader(data, split="train")
    every = max(1, len(reader) // CALIBRATION)
    return [one.images for one in EvaluationData(reader, recipe, 0, every, batch) if len(one.files)]

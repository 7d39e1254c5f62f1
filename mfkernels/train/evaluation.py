"""How often a network is right."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .data import Batch
from .processes import Processes


class Accuracy(NamedTuple):
    """Shares of the images, in percent, whose class is the first or one of the first five; and how many
    images could not be read."""

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
    """Of networks on the same images: accuracies, images a second, and the share of images, in percent, of
    which all say the same."""

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

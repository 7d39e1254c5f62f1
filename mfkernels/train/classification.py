"""Training of a network for classification by a recipe."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..models import create_model
from .data import Batch, EvaluationData, TrainingData, class_names, open_reader, seed_everything
from .evaluation import accuracy
from .loop import STOPPED, Loop
from .objective import Objective, mixing
from .processes import Processes
from .recipe import Recipe
from .schedule import learning_rate, temperature

__all__ = ["STOPPED", "Training"]


class Training(Loop):
    """A training for classification, from its beginning or from the newest checkpoint in its folder.

    The folder gets the resolved recipe, checkpoints, the best weights (`best.pt`), `history.csv` and
    `curves.png`.

    Args:
        recipe: its settings.
        root: the images, see `data.open_reader`.
        output: its folder, made if it is missing.
        processes: of which this is one.
        dataset, keys, splits: see `data.open_reader`; the splits of training and of evaluation.
        num_classes: of the network; by default the classes that the reader names.
        weights: path of weights to begin with.
        teacher_weights: path of the teacher's; timm's pretrained ones without it.
        save_minutes: between checkpoints; there is one at SIGTERM and at the end, too.
        keep: checkpoints that stay in the folder.

    Raises:
        ValueError: whatever does not fit, before the first step: images, classes, weights, sizes of batches,
            a checkpoint of another recipe.
        FileNotFoundError: no file of weights.
    """

    measure = "top1"
    panels = (("loss", ("loss",)), ("accuracy, %", ("top1", "top5")), ("learning rate", ("lr",)))

    def __init__(
        self,
        recipe: Recipe,
        root: str,
        output: Path,
        processes: Processes,
        *,
        dataset: str = "",
        keys: tuple[str, str] = ("image", "label"),
        splits: tuple[str, str] = ("train", "validation"),
        num_classes: int | None = None,
        weights: Path | None = None,
        teacher_weights: Path | None = None,
        save_minutes: float = 10.0,
        keep: int = 3,
    ) -> None:
        self.recipe, self.output, self.processes = recipe, output, processes
        self.save_seconds, self.keep = 60 * save_minutes, keep
        rank, count, device = processes.rank, processes.count, processes.device
        readers = [open_reader(root, dataset, split, keys) for split in splits]
        classes = num_classes or _classes(readers)
        share = recipe.batch_size // (count * recipe.accumulation)
        self.data = TrainingData(readers[0], recipe, rank, count)
        self.evaluation = EvaluationData(readers[1], recipe, rank, count, share)
        seed_everything(recipe.seed)
        self.network = _network(recipe, classes, weights).to(device)
        if recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if recipe.sync_bn and count > 1:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.objective = Objective(recipe, _teacher(recipe, classes, teacher_weights, device))
        self.mix = mixing(recipe, classes)
        self.optimizer = create_optimizer_v2(
            self.network, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.average: Any = ModelEmaV3(self.network, decay=recipe.ema_decay) if recipe.ema_decay else None
        self._begin(recipe.compile)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.recipe, step, self.data.steps_per_epoch)

    def _loss(self, batch: Batch) -> Tensor:
        device = self.processes.device
        form = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        images = batch.images.to(device, non_blocking=True).contiguous(memory_format=form)
        images, targets = self.mix(images, batch.targets.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            return self.objective(self.parallel(images), images, targets)

    def _train_step(self, epoch: int, count: int, batches: list[Batch]) -> bool:
        step = epoch * self.data.steps_per_epoch + self.step
        value = temperature(self.recipe, step, self.data.steps_per_epoch)
        networks = [self.network, self.average.module] if self.average else [self.network]
        for network in networks:
            if hasattr(network, "set_temperature"):
                network.set_temperature(value)
        return super()._train_step(epoch, count, batches)

    def _evaluate(self) -> dict[str, float]:
        top1, top5, unreadable = accuracy(self.evaluated, self.evaluation, self.processes, self.recipe.dtype)
        measures = dict(top1=top1, top5=top5, unreadable=unreadable)
        if hasattr(self.network, "temperature"):
            measures["temperature"] = self.network.temperature
        return measures

    def _weights(self) -> dict[str, Any]:
        return self.evaluated.state_dict()


def _classes(readers: list[Any]) -> int:
    names = [class_names(reader) for reader in readers]
    if names[0] is None:
        raise ValueError("the dataset does not name its classes: give num_classes")
    if names[1] and names[1] != names[0]:
        raise ValueError(f"the splits must have the same classes, got {names[0]} and {names[1]}")
    return len(names[0])


def _network(recipe: Recipe, classes: int, weights: Path | None) -> Any:
    names = ("dropout", "drop_path")
    options: dict[str, Any] = {
        name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None
    }
    if recipe.distillation:
        options["distillation"] = True
    try:
        network: Any = create_model(recipe.model, num_classes=classes, checkpoint=weights, **options)
    except TypeError as error:
        raise ValueError(
            f"recipe: {recipe.model} does not take all of {', '.join(options)}: {error}"
        ) from error
    if recipe.checkpoint_activations:
        network.set_grad_checkpointing()
    return network


def _teacher(recipe: Recipe, classes: int, weights: Path | None, device: torch.device) -> nn.Module | None:
    if not recipe.distillation:
        return None
    source: dict[str, Any] = dict(checkpoint_path=str(weights)) if weights else dict(pretrained=True)
    teacher = timm.create_model(recipe.teacher, num_classes=classes, **source)
    return teacher.to(device).eval().requires_grad_(False)

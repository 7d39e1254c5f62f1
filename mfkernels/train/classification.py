"""Training of a network for classification by a recipe."""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import progress
from ..models import create_model
from . import checkpoint, history
from .data import Batch, EvaluationData, TrainingData, class_names, open_reader, seed_everything
from .evaluation import accuracy
from .objective import Objective, mixing
from .processes import Processes
from .recipe import Recipe, differences, save_recipe
from .schedule import learning_rate, temperature

STOPPED = 128 + signal.SIGTERM  # exit status after SIGTERM


class Training:
    """A training for classification, from its beginning or from the newest checkpoint in its folder.

    The folder gets the resolved recipe, checkpoints, the best weights (`best.pt`), `history.csv` and
    `curves.png`.

    Args:
        recipe: its settings.
        root: the images, see `data.open_reader`.
        output: its folder, made if it is missing.
        processes: of which this is one.
        dataset, splits: see `data.open_reader`; the splits of training and of evaluation.
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

    def __init__(
        self,
        recipe: Recipe,
        root: str,
        output: Path,
        processes: Processes,
        *,
        dataset: str = "",
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
        readers = [open_reader(root, dataset, split) for split in splits]
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
        self.epoch, self.step = 0, 0  # steps of this epoch that are done
        self.sums = torch.zeros(3, dtype=torch.float64)  # of this epoch: losses, images, unreadable ones
        self.rows: list[dict[str, float]] = []
        self.best = -1.0
        output.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._stopping = False
        self._saved = time.monotonic()
        self.parallel: Any = torch.compile(self.network) if recipe.compile else self.network
        if count > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.parallel, device_ids=ids)

    def run(self) -> None:
        """Train to the end; at SIGTERM write a checkpoint and leave with exit status 143.

        Raises:
            FloatingPointError: a loss is not finite; it names the files of the batch.
        """
        if self.processes.first:
            save_recipe(self.recipe, self.output / "recipe.yaml")
        before = signal.signal(signal.SIGTERM, self._on_stop)
        try:
            for epoch in range(self.epoch, self.recipe.epochs):
                self._train_epoch(epoch)
                self._end_epoch(epoch)
            self._save()
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_stop(self, *_: Any) -> None:
        self._stopping = True

    def _train_epoch(self, epoch: int) -> None:
        self.parallel.train()
        begin, seen = time.monotonic(), 0
        for count, batches in self.data.epoch(epoch, self.step):
            stop = self._train_step(epoch, count, batches)
            self.step += 1
            seen += count
            self._show(epoch, seen / (time.monotonic() - begin))
            if stop:
                self._save()
                raise SystemExit(STOPPED)
            if time.monotonic() - self._saved > self.save_seconds:
                self._save()
        self._speed = seen / max(time.monotonic() - begin, 1e-9)

    def _train_step(self, epoch: int, count: int, batches: list[Batch]) -> bool:
        """Do a step of `count` images, of which this process has `batches`. Returns whether to stop."""
        recipe, processes = self.recipe, self.processes
        step = epoch * self.data.steps_per_epoch + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, self.data.steps_per_epoch) * group.get("lr_scale", 1.0)
        self._set_temperature(step)
        total = torch.zeros((), device=processes.device)
        for part, batch in enumerate(batches):
            seed_everything(recipe.seed, step, processes.rank * len(batches) + part)
            last = part == len(batches) - 1
            with nullcontext() if last or processes.count == 1 else self.parallel.no_sync():
                loss = self._loss(batch)
                # Processes average their gradients; the sum over all of the step's images is what counts.
                (loss * (processes.count / count)).backward()
            total += loss.detach()
        unreadable = sum(len(batch.broken) for batch in batches)
        self._name_unreadable(batches)
        here = torch.tensor([total.item(), unreadable, self._stopping], dtype=torch.float64)
        losses, unreadable, stop = processes.sum(here).tolist()
        if not math.isfinite(losses):
            files = ", ".join(name for batch in batches for name in batch.files)
            raise FloatingPointError(
                f"epoch {epoch}, step {self.step}: the loss is {losses}, in this process "
                f"{total.item()}, of {files}"
            )
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.network, step)
        self.sums += torch.tensor([losses, count, unreadable], dtype=torch.float64)
        return bool(stop)

    def _loss(self, batch: Batch) -> Tensor:
        device = self.processes.device
        form = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        images = batch.images.to(device, non_blocking=True).contiguous(memory_format=form)
        images, targets = self.mix(images, batch.targets.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            return self.objective(self.parallel(images), images, targets)

    def _set_temperature(self, step: int) -> None:
        value = temperature(self.recipe, step, self.data.steps_per_epoch)
        networks = [self.network, self.average.module] if self.average else [self.network]
        for network in networks:
            if hasattr(network, "set_temperature"):
                network.set_temperature(value)

    def _end_epoch(self, epoch: int) -> None:
        network = self.average.module if self.average else self.network
        top1, top5, unreadable = accuracy(network, self.evaluation, self.processes, self.recipe.dtype)
        losses, count, skipped = self.sums.tolist()
        row = dict(
            epoch=epoch + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            loss=losses / max(count, 1),
            top1=top1,
            top5=top5,
            images_per_second=self._speed,
            unreadable=skipped + unreadable,
        )
        self.rows.append(row)
        self.epoch, self.step = epoch + 1, 0
        self.sums.zero_()
        if self.processes.first:
            progress.show(history.line(row), keep=True)
            history.write(self.output, self.rows)
            if top1 > self.best:
                checkpoint.save_weights(self.output / "best.pt", network.state_dict())
        self.best = max(self.best, top1)

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.processes.first:
            state = dict(
                recipe=asdict(self.recipe),
                network=self.network.state_dict(),
                average=self.average.module.state_dict() if self.average else None,
                optimizer=self.optimizer.state_dict(),
                epoch=self.epoch,
                step=self.step,
                sums=self.sums,
                rows=self.rows,
                best=self.best,
            )
            checkpoint.save(self.output, state, self.epoch, self.step, self.keep)

    def _resume(self) -> None:
        state = checkpoint.load_newest(self.output)
        if state is None:
            return
        others = differences(self.recipe, Recipe(**state["recipe"]))
        if others:
            raise ValueError(
                f"{self.output} has a training with other settings of {', '.join(others)}: give those, or "
                "another folder"
            )
        self.network.load_state_dict(state["network"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.sums, self.rows, self.best = state["sums"], state["rows"], state["best"]
        if self.processes.first:
            progress.show(f"{self.output}: goes on at epoch {self.epoch + 1}, step {self.step}", keep=True)

    def _show(self, epoch: int, speed: float) -> None:
        if self.processes.first:
            loss = self.sums[0] / self.sums[1]
            progress.show(
                f"epoch {epoch + 1}/{self.recipe.epochs}, step {self.step}/{self.data.steps_per_epoch}, "
                f"loss {loss:.4f}, {speed:.0f} images/s"
            )

    def _name_unreadable(self, batches: list[Batch]) -> None:
        for text in (text for batch in batches for text in batch.broken):
            print(f"an image that cannot be read is left out: {text}", file=sys.stderr, flush=True)


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

"""The loop of a training: steps, epochs, checkpoints, and how it stops and goes on."""

import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import progress
from . import checkpoint, history
from .data import seed_everything
from .processes import Processes
from .recipe import differences, save_recipe

STOPPED = 128 + signal.SIGTERM  # exit status after SIGTERM


class Loop(ABC):
    """What trainings share. One sets the attributes below, then calls `_begin`.

    Attributes:
        recipe: its settings.
        output: its folder, made if it is missing.
        processes: of which this is one.
        data: the batches; `epoch(epoch, first_step)` yields for each step how many images it has, and this
            process's batches of it. `steps_per_epoch` of them.
        network, optimizer: each group's learning rate is that of the step times its "lr_scale", if it has
            one.
        average: the averaged network or None.
        save_seconds: between checkpoints; there is one at SIGTERM and at the end, too.
        keep: checkpoints that stay in the folder.
    """

    recipe: Any
    output: Path
    processes: Processes
    data: Any
    network: Any
    optimizer: Any
    average: Any = None
    save_seconds: float
    keep: int
    measure: str  # the column of the history that the best weights have the most of
    panels: history.Panels

    @abstractmethod
    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of a step since the beginning of the training."""

    @abstractmethod
    def _loss(self, batch: Any) -> Tensor:
        """Return the sum of the losses of a batch's images."""

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the averaged one, if there is one."""
        return self.average.module if self.average else self.network

    @abstractmethod
    def _evaluate(self) -> dict[str, float]:
        """Measures of the network by name, the same in all processes; `unreadable` images among them."""

    @abstractmethod
    def _weights(self) -> dict[str, Any]:
        """Return the weights that users load."""

    def _begin(self, compiled: bool = False) -> None:
        self.epoch, self.step = 0, 0  # steps of this epoch that are done
        self.sums = torch.zeros(3, dtype=torch.float64)  # of this epoch: losses, images, unreadable ones
        self.rows: list[dict[str, float]] = []
        self.best = -1.0
        self.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._stopping = False
        self._saved = time.monotonic()
        self.parallel: Any = torch.compile(self.network) if compiled else self.network
        if self.processes.count > 1:
            device = self.processes.device
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

    def _train_step(self, epoch: int, count: int, batches: list[Any]) -> bool:
        """Do a step of `count` images, of which this process has `batches`. Returns whether to stop."""
        recipe, processes = self.recipe, self.processes
        step = epoch * self.data.steps_per_epoch + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step) * group.get("lr_scale", 1.0)
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

    def _end_epoch(self, epoch: int) -> None:
        if self.processes.count > 1:
            # Running statistics are the first process's, as DDP has them in a step: what all evaluate is what
            # is saved.
            distribute_bn(self.evaluated, self.processes.count, reduce=False)
        measures = self._evaluate()
        losses, count, skipped = self.sums.tolist()
        row = dict(
            epoch=epoch + 1,
            lr=self.optimizer.param_groups[0]["lr"],
            loss=losses / max(count, 1),
            **measures,
            images_per_second=self._speed,
        )
        row["unreadable"] = row.pop("unreadable") + skipped  # the last column
        self.rows.append(row)
        self.epoch, self.step = epoch + 1, 0
        self.sums.zero_()
        if self.processes.first:
            progress.show(history.line(row), keep=True)
            history.write(self.output, self.rows, self.panels)
            if row[self.measure] > self.best:
                checkpoint.save_weights(self.output / "best.pt", self._weights())
        self.best = max(self.best, row[self.measure])

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
        begins = self.processes.gather((state["epoch"], state["step"]) if state else (0, 0))
        if len(set(begins)) > 1:
            raise ValueError(
                f"{self.output} must be the same folder for all processes: their newest checkpoints are of "
                f"the epochs and steps {', '.join(map(str, begins))}"
            )
        if state is None:
            return
        before = state["recipe"]
        if set(before) - set(asdict(self.recipe)):
            raise ValueError(f"{self.output} has a training of another kind: give another folder")
        others = differences(self.recipe, type(self.recipe)(**before))
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

    def _name_unreadable(self, batches: list[Any]) -> None:
        for text in (text for batch in batches for text in batch.broken):
            print(f"an image that cannot be read is left out: {text}", file=sys.stderr, flush=True)

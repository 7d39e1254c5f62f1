"""Training of a detector by a recipe."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .coco import MEASURES, Annotations, average_precision, load_annotations
from .data import seed_everything
from .detection_data import DetectionBatch, DetectionData, evaluation_batches
from .detection_recipe import DetectionRecipe, step_learning_rate
from .detectors import create_detector
from .loop import Loop
from .processes import Processes


class DetectionTraining(Loop):
    """A training for detection, from its beginning or from the newest checkpoint in its folder.

    The folder gets the resolved recipe, checkpoints, the weights of the best AP (`best.pt`), `history.csv`
    and `curves.png`.

    Args:
        recipe: its settings.
        root: a folder in COCO's format, see `coco.load_annotations`.
        output: its folder, made if it is missing.
        processes: of which this is one.
        splits: of training and of evaluation.
        weights: path of a classifier's weights for the backbone.
        save_minutes: between checkpoints; there is one at SIGTERM and at the end, too.
        keep: checkpoints that stay in the folder.

    Raises:
        ValueError: whatever does not fit, before the first step: annotations, weights, sizes of batches, a
            checkpoint of another recipe.
        FileNotFoundError: no file of weights.
    """

    measure = "AP"
    panels = (("loss", ("loss",)), ("%", MEASURES), ("learning rate", ("lr",)))

    def __init__(
        self,
        recipe: DetectionRecipe,
        root: str | Path,
        output: Path,
        processes: Processes,
        *,
        splits: tuple[str, str] = ("train", "validation"),
        weights: Path | None = None,
        save_minutes: float = 10.0,
        keep: int = 3,
    ) -> None:
        self.recipe, self.output, self.processes = recipe, output, processes
        self.save_seconds, self.keep = 60 * save_minutes, keep
        train, self.truth = (load_annotations(root, split) for split in splits)
        self._check_sets(train, splits)
        self.data = DetectionData(train, recipe, processes.rank, processes.count)
        self.evaluation = evaluation_batches(self.truth, recipe, processes.rank, processes.count)
        seed_everything(recipe.seed)
        self.network = create_detector(recipe, len(train.names), weights).to(processes.device)
        self.optimizer = _optimizer(recipe, self.network)
        self._begin()

    def _check_sets(self, train: Annotations, splits: tuple[str, str]) -> None:
        if (train.names, train.category_ids) != (self.truth.names, self.truth.category_ids):
            raise ValueError(
                f"the splits must have the same categories, got {train.names} and {self.truth.names}"
            )
        for split, found in zip(splits, (train, self.truth), strict=True):
            if found.left_out and self.processes.first:
                print(
                    f"{split}: {found.left_out} boxes without an area are left out",
                    file=sys.stderr,
                    flush=True,
                )

    def _learning_rate(self, step: int) -> float:
        return step_learning_rate(self.recipe, step, self.data.steps_per_epoch)

    def _loss(self, batch: DetectionBatch) -> Tensor:
        device = self.processes.device
        images = [image.to(device) for image in batch.images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in batch.targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            return self.parallel(images, targets) * len(images)

    def _evaluate(self) -> dict[str, float]:
        results, unreadable = [], 0
        self.network.eval()
        with torch.inference_mode():
            for batch in self.evaluation:
                unreadable += len(batch.broken)
                if batch.images:
                    results += self._results(batch)
        everybodys = [result for of_one in self.processes.gather(results) for result in of_one]
        unreadable = int(self.processes.sum(torch.tensor(unreadable)))
        return dict(**average_precision(self.truth, everybodys), unreadable=unreadable)

    def _results(self, batch: DetectionBatch) -> list[dict[str, Any]]:
        """Return what is found, in COCO's form."""
        device, results = self.processes.device, []
        found = self.network([image.to(device) for image in batch.images])
        for image, photo, objects in zip(batch.images, batch.photos, found, strict=True):
            scale = torch.tensor([photo.width / image.shape[2], photo.height / image.shape[1]])
            boxes = objects["boxes"].float().cpu() * scale.repeat(2)
            rows = zip(objects["scores"].tolist(), objects["labels"].tolist(), boxes.tolist(), strict=True)
            results += [
                dict(
                    image_id=photo.id,
                    category_id=self.truth.category_ids[label],
                    bbox=[left, top, right - left, bottom - top],
                    score=score,
                )
                for score, label, (left, top, right, bottom) in rows
            ]
        return results

    def _weights(self) -> dict[str, Any]:
        return self.network.detector.state_dict()


def _optimizer(recipe: DetectionRecipe, network: Any) -> torch.optim.Optimizer:
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    of_backbone = set(network.backbone.parameters())
    backbone = [parameter for parameter in learned if parameter in of_backbone]
    rest = [parameter for parameter in learned if parameter not in of_backbone]
    groups = [dict(params=rest, lr_scale=1.0), dict(params=backbone, lr_scale=recipe.backbone_lr)]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay, fused=True)

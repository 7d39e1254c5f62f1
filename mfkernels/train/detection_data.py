"""Photos with boxes: which of them make which step, how they are read, flipped and brought to a size.

As in `data`, every random choice is drawn from the recipe's seed and from what it is for.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import Annotations, Photo
from .data import seed_everything
from .detection_recipe import DetectionRecipe


class DetectionBatch(NamedTuple):
    """Hold images (3, H, W) in 0..1, each of its own size, and their objects.

    Each image has a dictionary of `boxes` (n, 4), its corners in pixels of the image, and `labels` (n),
    int64. The batch also has the photos, the names of their files, and the names of files that could not be
    read, with the reason.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    photos: list[Photo]
    files: tuple[str, ...]
    broken: tuple[str, ...]


class DetectionPhotos(Dataset):
    """The photos of a set. Its keys are (epoch, index); in epoch None, evaluation, there is no flip.

    A photo that cannot be read, or is of another size than the annotations say, is left out. In training the
    next one takes its place.
    """

    def __init__(self, annotations: Annotations, recipe: DetectionRecipe) -> None:
        self.photos, self.recipe = annotations.photos, recipe
        self.flip = v2.RandomHorizontalFlip(recipe.hflip)
        self.to_float = v2.ToDtype(torch.float32, scale=True)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: tuple[int | None, int]) -> Any:
        epoch, index = key
        broken: list[str] = []
        while len(broken) < len(self):
            photo = self.photos[index]
            try:
                pixels = _read(photo)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                broken.append(f"{photo.path}: {error}")
                if epoch is None:
                    return None, None, photo, broken
                index = (index + 1) % len(self)
                continue
            boxes = tv_tensors.BoundingBoxes(
                torch.from_numpy(photo.boxes), format="XYXY", canvas_size=(photo.height, photo.width)
            )
            if epoch is not None:
                seed_everything(self.recipe.seed, epoch, index)
                pixels, boxes = self.flip(pixels, boxes)
            pixels, boxes = (
                self.to_float(v2.functional.resize(pixels, self._size(photo))),
                v2.functional.resize(boxes, self._size(photo)),
            )
            target = dict(boxes=boxes.as_subclass(Tensor), labels=torch.from_numpy(photo.labels))
            return pixels.as_subclass(Tensor), target, photo, broken
        raise RuntimeError(f"none of the {len(broken)} images can be read: {broken[:3]}")

    def _size(self, photo: Photo) -> list[int]:
        sides = (photo.height, photo.width)
        scale = min(self.recipe.short_side / min(sides), self.recipe.long_side / max(sides))
        return [max(1, round(side * scale)) for side in sides]


class DetectionData:
    """The batches of a training, this process's share of each.

    Args:
        annotations: of the set.
        recipe: of the training.
        rank, processes: which process of how many this one is.

    Raises:
        ValueError: a batch does not divide among the processes, or there are too few photos for it.
    """

    def __init__(self, annotations: Annotations, recipe: DetectionRecipe, rank: int, processes: int) -> None:
        count = len(annotations.photos)
        if recipe.batch_size % processes:
            raise ValueError(f"batch_size {recipe.batch_size} must be a multiple of {processes} processes")
        self.steps_per_epoch = -(-count // recipe.batch_size)
        least = 1 if recipe.freeze_norms else 2
        if count // self.steps_per_epoch // processes < least:
            raise ValueError(
                f"a process's share of a batch must have at least {least} images"
                f"{'' if recipe.freeze_norms else ', since batch norm needs them'}; {count} images in "
                f"{self.steps_per_epoch} steps an epoch and {processes} processes leave "
                f"{count // self.steps_per_epoch // processes}"
            )
        self._recipe, self._count, self._rank, self._processes = recipe, count, rank, processes
        self._photos = DetectionPhotos(annotations, recipe)

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[int, list[DetectionBatch]]]:
        """Yield each step of an epoch from `first_step` on.

        A step is its images (those of all processes) and the batch of this process.
        """
        order = np.random.default_rng([self._recipe.seed, epoch]).permutation(self._count)
        steps = np.array_split(order, self.steps_per_epoch)[first_step:]
        shares = [np.array_split(step, self._processes)[self._rank] for step in steps]
        keys = [[(epoch, int(index)) for index in share] for share in shares]
        for step, batch in zip(steps, _loader(self._photos, keys, self._recipe.workers), strict=True):
            yield len(step), [batch]


def evaluation_batches(
    annotations: Annotations, recipe: DetectionRecipe, rank: int, processes: int
) -> DataLoader:
    """Return the batches of an evaluation: of all photos those of this process."""
    keys = [(None, index) for index in range(rank, len(annotations.photos), processes)]
    share = max(1, recipe.batch_size // processes)
    batches = [keys[i : i + share] for i in range(0, len(keys), share)]
    return _loader(DetectionPhotos(annotations, recipe), batches, recipe.workers)


def _read(photo: Photo) -> tv_tensors.Image:
    with Image.open(photo.path) as file:
        pixels = tv_tensors.Image(file.convert("RGB"))
    height, width = pixels.shape[1:]
    if (height, width) != (photo.height, photo.width):
        raise ValueError(f"{width}x{height} pixels, where the annotations say {photo.width}x{photo.height}")
    return pixels


def _loader(photos: DetectionPhotos, batches: list[Any], workers: int) -> DataLoader:
    return DataLoader(photos, batch_sampler=batches, num_workers=workers, collate_fn=_collate)


def _collate(items: list[Any]) -> DetectionBatch:
    good = [item for item in items if item[0] is not None]
    return DetectionBatch(
        [item[0] for item in good],
        [item[1] for item in good],
        [item[2] for item in good],
        tuple(str(item[2].path) for item in good),
        tuple(text for item in items for text in item[3]),
    )

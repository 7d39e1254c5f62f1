"""Images: which of them make which step, how they are read, augmented and mixed.

Every random choice is drawn from the recipe's seed and from what it is for: an epoch's order from the epoch,
an image's augmentation from epoch and image. So nothing depends on the number of processes or workers, and a
training that goes on in the middle of an epoch sees what it would have seen.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .recipe import Recipe

_STREAMS = ("wds/", "hfids/", "tfds/")  # timm's names of datasets without numbered images
_IN_A_ROW = 50  # images that cannot be read, after which it is not the images


class Batch(NamedTuple):
    """Images and classes, the names of their files, and those of files that could not be read."""

    images: Tensor
    targets: Tensor
    files: tuple[str, ...]
    broken: tuple[str, ...]


class Step(NamedTuple):
    """The images of a step by their numbers, and their size in pixels."""

    indices: np.ndarray
    size: int


class Photos(Dataset):
    """Photos of a reader of timm's, each made an image by a transform.

    Its keys are (epoch, index, size); epoch None is evaluation, in which a photo that cannot be read is left
    out. In training the next one takes its place.
    """

    def __init__(self, reader: Any, transforms: dict[int, Callable], seed: int) -> None:
        self.reader, self.transforms, self.seed = reader, transforms, seed

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: tuple[int | None, int, int]) -> Any:
        epoch, index, size = key
        broken: list[str] = []
        while True:
            try:
                photo, target = self._read(index)
                break
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                broken.append(f"{self.reader.filename(index)}: {error}")
                if epoch is None:
                    return None, None, "", broken
                if len(broken) == min(_IN_A_ROW, len(self)):
                    raise RuntimeError(f"{len(broken)} images in a row cannot be read: {broken}") from None
                index = (index + 1) % len(self)
        if epoch is not None:
            seed_everything(self.seed, epoch, index)
        return self.transforms[size](photo), target, self.reader.filename(index), broken

    def _read(self, index: int) -> tuple[Image.Image, int]:
        photo, target = self.reader[index]
        if not isinstance(photo, Image.Image):
            photo = Image.open(photo)
        return photo.convert("RGB"), target


def seed_everything(*numbers: int) -> None:
    """Seed the random generators of Python, NumPy and PyTorch with what follows from some numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def steps_per_epoch(recipe: Recipe, count: int) -> int:
    """Return the steps in which an epoch sees each of `count` images once."""
    return -(-count // recipe.batch_size)


def epoch_steps(recipe: Recipe, count: int, epoch: int) -> list[Step]:
    """Return the steps of an epoch.

    Each image is in one of them, and their numbers of images differ by one at most, so that no batch is too
    small for its batch norms.
    """
    generator = np.random.default_rng([recipe.seed, epoch])
    order = generator.permutation(count)
    steps = steps_per_epoch(recipe, count)
    sizes = generator.choice(recipe.sizes, steps)
    return [Step(part, int(size)) for part, size in zip(np.array_split(order, steps), sizes, strict=True)]


class _Keys(Sampler):
    """The keys of this process's parts of some steps of an epoch."""

    def __init__(self, parts: int, rank: int, processes: int) -> None:
        self.parts, self.rank, self.processes = parts, rank, processes
        self.epoch = 0
        self.steps: list[Step] = []

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            shares = np.array_split(step.indices, self.processes * self.parts)
            for share in shares[self.rank * self.parts : (self.rank + 1) * self.parts]:
                yield [(self.epoch, int(index), step.size) for index in share]


class TrainingData:
    """The batches of a training, this process's parts of them.

    Args:
        reader: of the photos.
        recipe: of the training.
        rank, processes: which process of how many this one is.

    Raises:
        ValueError: a batch does not divide among the processes, or its parts are too small for batch norms.
    """

    def __init__(self, reader: Any, recipe: Recipe, rank: int, processes: int) -> None:
        count, parts = len(reader), processes * recipe.accumulation
        steps = steps_per_epoch(recipe, count)
        if recipe.batch_size % parts:
            raise ValueError(
                f"batch_size {recipe.batch_size} must be a multiple of {parts}: {processes} processes, "
                f"accumulation {recipe.accumulation}"
            )
        if count // steps // parts < 2:
            raise ValueError(
                f"a part of a batch must have at least 2 images, since batch norm needs them; {count} "
                f"images in {steps} steps an epoch and {parts} parts a step leave {count // steps // parts}"
            )
        self.steps_per_epoch = steps
        self._count, self._recipe = count, recipe
        self._keys = _Keys(recipe.accumulation, rank, processes)
        transforms = {size: _training_transform(recipe, size) for size in recipe.sizes}
        self._loader = _loader(Photos(reader, transforms, recipe.seed), self._keys, recipe.workers)

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield each step of an epoch from `first_step` on.

        A step is its images (those of all processes) and the batches of this process.
        """
        steps = epoch_steps(self._recipe, self._count, epoch)[first_step:]
        self._keys.epoch, self._keys.steps = epoch, steps
        batches = iter(self._loader)
        for step in steps:
            yield len(step.indices), [next(batches) for _ in range(self._recipe.accumulation)]


class EvaluationData:
    """The batches of an evaluation: of all photos, in turn, those of this process.

    Args:
        reader: of the photos.
        recipe: of the training.
        rank, processes: which process of how many this one is.
        batch_size: images in a batch.
    """

    def __init__(self, reader: Any, recipe: Recipe, rank: int, processes: int, batch_size: int) -> None:
        keys = [(None, index, recipe.image_size) for index in range(rank, len(reader), processes)]
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        transforms = {recipe.image_size: _evaluation_transform(recipe)}
        self._loader = _loader(Photos(reader, transforms, 0), batches, recipe.workers)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def open_reader(
    root: str, dataset: str = "", split: str = "train", keys: tuple[str, str] = ("image", "label")
) -> Any:
    """Return timm's reader of a folder of classes, of a tar file of them or of a Hugging Face dataset.

    Args:
        root: the folder; of a Hugging Face dataset that in which its copy is kept.
        dataset: what timm calls the dataset's name: "" for folders and tar files, "hfds/NAME" for those of
            Hugging Face, where NAME may be a folder of webdataset's shards, too.
        split: of it; a folder or tar file of that name is looked for, or a folder of one that means the same.
        keys: of a Hugging Face dataset, the columns of the images and of the classes.

    Raises:
        ValueError: there is no such folder, or no image in it; or a dataset that is read in its own order
            alone.
    """
    if dataset.lower().startswith(_STREAMS):
        raise ValueError(
            f"{dataset} gives its images in an order of its own, with which a training could not go on where "
            "it stopped; read the same images by their numbers: hfds/NAME"
        )
    tar = Path(root, f"{split}.tar")
    names = dict(zip(("input_key", "target_key"), keys, strict=True))
    try:
        found = create_dataset(
            dataset,
            str(tar) if not dataset and tar.is_file() else root,
            split=split,
            **names if dataset.lower().startswith("hfds/") else {},
        )
        count = len(found)
    except (AssertionError, FileNotFoundError, RuntimeError) as error:
        raise ValueError(f"no images of the split {split!r} in {dataset or root}: {error}") from error
    if not count:
        raise ValueError(f"no images of the split {split!r} in {dataset or root}")
    return found.reader


def class_names(reader: Any) -> list[str] | None:
    """Return the names of a reader's classes by their numbers, None where it does not tell."""
    names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(names, key=names.get) if names else None


def _training_transform(recipe: Recipe, size: int) -> Callable:
    return create_transform(
        size,
        is_training=True,
        scale=recipe.crop_scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        interpolation=recipe.interpolation,
        re_prob=recipe.random_erase,
        re_mode="pixel",
    )


def _evaluation_transform(recipe: Recipe) -> Callable:
    return create_transform(
        recipe.image_size, interpolation=recipe.interpolation, crop_pct=recipe.crop_fraction
    )


def _loader(photos: Photos, keys: Sampler | Sequence[Any], workers: int) -> DataLoader:
    return DataLoader(
        photos,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _collate(items: list[Any]) -> Batch:
    good = [item for item in items if item[0] is not None]
    broken = tuple(text for item in items for text in item[3])
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), broken)
    images, targets, files, _ = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), files, broken)

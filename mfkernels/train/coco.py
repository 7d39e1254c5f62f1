"""Images and boxes in COCO's format, and average precision."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

_SMALLEST = 0.01  # side of a box in pixels; float32 has no room for much smaller ones


class Photo(NamedTuple):
    """Describe a photo of a set: its number, path, size in pixels, and objects.

    Objects have corners (n, 4) in pixels within the photo and classes (n), 0 to classes - 1; crowds are not
    among them.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray


class Annotations(NamedTuple):
    """Hold a set: its photos, the names and numbers of its classes, and the content of its file.

    Classes are in the order of their numbers. The last field counts the boxes without an area, which were
    left out.
    """

    photos: list[Photo]
    names: list[str]
    category_ids: list[int]
    content: dict[str, Any]
    left_out: int


def load_annotations(root: str | Path, split: str) -> Annotations:
    """Read a set in COCO's format: `annotations/instances_SPLIT.json`, images in `SPLIT/`.

    Boxes are clipped to the photo; those with a side of less than 0.01 pixels after that, of which COCO has
    some, are left out and counted. A photo without objects stays.

    Args:
        root: the folder.
        split: for example "train2017".

    Raises:
        ValueError: no such file, no JSON, a part or key that is missing, a number twice, an annotation of an
            unknown photo or category, a box that is no four finite numbers or is outside of its photo, a set
            without photos or without categories; the file and the annotation are named.
    """
    path = Path(root) / "annotations" / f"instances_{split}.json"
    try:
        content = json.loads(path.read_text())
        photos, categories, annotations = (content[k] for k in ("images", "categories", "annotations"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"no annotations of the split {split!r} in {root}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold images, categories and annotations, lacks {error}") from error
    _check_ids(path, "images", photos, ("file_name", "width", "height"))
    _check_ids(path, "categories", categories, ("name",))
    _check_ids(path, "annotations", annotations, ("image_id", "category_id", "bbox"))
    if not photos or not categories:
        raise ValueError(f"{path} must have an image and a category at least")
    categories = sorted(categories, key=lambda category: category["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    by_id = {photo["id"]: photo for photo in photos}
    objects: dict[Any, list[tuple[list[float], int]]] = {photo["id"]: [] for photo in photos}
    left_out = 0
    for annotation in annotations:
        box = _box(path, annotation, by_id, number)
        if box is None:
            left_out += 1
        elif not annotation.get("iscrowd"):
            objects[annotation["image_id"]].append((box, number[annotation["category_id"]]))
    return Annotations(
        [_photo(Path(root) / split, photo, objects[photo["id"]]) for photo in photos],
        [category["name"] for category in categories],
        [category["id"] for category in categories],
        content,
        left_out,
    )


def average_precision(annotations: Annotations, results: list[dict[str, Any]]) -> dict[str, float]:
    """Return COCO's average precisions of boxes, in percent; 0 where there are no objects of that size.

    Args:
        annotations: the truth.
        results: of all photos, in COCO's form: `image_id`, `category_id`, `bbox` (left, top, width, height)
            and `score`.

    Returns:
        From each of `MEASURES` to its value.
    """
    if not results:
        return dict.fromkeys(MEASURES, 0.0)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    # The evaluation needs what the format makes optional.
    truth.dataset = dict(annotations.content) | dict(
        annotations=[
            dict(iscrowd=0, area=a["bbox"][2] * a["bbox"][3]) | a for a in annotations.content["annotations"]
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = 100 * evaluation.stats[: len(MEASURES)]
    return {name: max(float(value), 0.0) for name, value in zip(MEASURES, values, strict=True)}


def _check_ids(path: Path, part: str, entries: Any, keys: tuple[str, ...]) -> None:
    seen = set()
    for entry in entries:
        missing = [key for key in ("id", *keys) if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{path}: each of {part} must have {', '.join(missing)}, got {entry!r}")
        if entry["id"] in seen:
            raise ValueError(f"{path}: {part} has the id {entry['id']} twice")
        seen.add(entry["id"])


def _box(
    path: Path, annotation: dict[str, Any], photos: dict[Any, Any], categories: dict[Any, int]
) -> list[float] | None:
    """Return the corners within the photo; None for a box without an area to speak of."""
    where = f"{path}: annotation {annotation['id']}"
    photo, box = photos.get(annotation["image_id"]), annotation["bbox"]
    if photo is None:
        raise ValueError(f"{where} is of image {annotation['image_id']}, which is not among the images")
    if annotation["category_id"] not in categories:
        raise ValueError(
            f"{where} is of category {annotation['category_id']}, which is not among the categories"
        )
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not numbers or not all(math.isfinite(v) for v in box) or box[2] < 0 or box[3] < 0:
        raise ValueError(f"{where} must have a bbox of left, top, width and height, got {box!r}")
    left, top, width, height = box
    edges = [left, top, left + width, top + height]
    clipped = [min(max(v, 0), photo["height" if i % 2 else "width"]) for i, v in enumerate(edges)]
    # Sizes and places are often rounded, each to a pixel.
    if max(abs(a - b) for a, b in zip(edges, clipped, strict=True)) > 2:
        raise ValueError(
            f"{where} has a bbox outside of its image: {box} in {photo['width']}x{photo['height']} pixels "
            f"of {photo['file_name']}"
        )
    sides = (clipped[2] - clipped[0], clipped[3] - clipped[1])
    return clipped if min(sides) >= _SMALLEST else None


def _photo(folder: Path, photo: dict[str, Any], objects: list[tuple[list[float], int]]) -> Photo:
    return Photo(
        photo["id"],
        folder / photo["file_name"],
        photo["width"],
        photo["height"],
        np.array([box for box, _ in objects], dtype=np.float32).reshape(-1, 4),
        np.array([label for _, label in objects], dtype=np.int64),
    )

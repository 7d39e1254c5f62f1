"""Make a small real set for detection that needs no download.

It has scikit-learn's handwritten digits on photographs, in COCO's format.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_SIDES = (0.14, 0.4)  # of a digit, as shares of the image's side
_MOST = 5  # digits on an image
_OVERLAP = 0.1  # share of a digit that another may cover, at most


def write(folder: Path, train: int = 2000, validation: int = 400, side: int = 128, seed: int = 0) -> int:
    """Write images of photographs with digits at random places and sizes, and their annotations.

    Scans and photographs are those of scikit-learn and of scikit-image (astronaut, coffee, chelsea, rocket);
    where scikit-image is not installed, scikit-learn's two photographs. Scans of the validation images are on
    no training image.

    Args:
        folder: made if it is missing.
        train, validation: how many images.
        side: of the images in pixels.
        seed: of all random choices.

    Returns:
        The number of digits on them.

    Raises:
        ValueError: a number that is less than 1, or a side of less than 32.
    """
    for name, value, least in (("train", train, 1), ("validation", validation, 1), ("side", side, 32)):
        if value < least:
            raise ValueError(f"digits_on_photos: {name} must be at least {least}, got {value}")
    from sklearn.datasets import load_digits

    digits, photographs, count = load_digits(), _photographs(), 0
    for split, images in (("train", train), ("validation", validation)):
        scans = [i for i in range(len(digits.target)) if (i % 6 == 0) == (split == "validation")]
        generator = np.random.default_rng([seed, split == "validation"])
        content: dict[str, list[Any]] = dict(images=[], annotations=[])
        content["categories"] = [dict(id=i + 1, name=str(i)) for i in range(10)]
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            pixels = _background(photographs, side, generator)
            for box in _places(side, generator):
                scan = int(generator.choice(scans))
                bbox = _draw(pixels, digits.images[scan], box, generator)
                content["annotations"].append(
                    dict(
                        id=len(content["annotations"]) + 1,
                        image_id=index + 1,
                        category_id=int(digits.target[scan]) + 1,
                        bbox=bbox,
                        area=bbox[2] * bbox[3],
                        iscrowd=0,
                    )
                )
            name = f"{index + 1:05d}.png"
            Image.fromarray(pixels).save(folder / split / name)
            content["images"].append(dict(id=index + 1, file_name=name, width=side, height=side))
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        count += len(content["annotations"])
    return count


def _photographs() -> list[np.ndarray]:
    try:
        from skimage import data

        return [np.asarray(of())[..., :3] for of in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    except ImportError:
        from sklearn.datasets import load_sample_images

        return list(load_sample_images().images)


def _background(photographs: list[np.ndarray], side: int, generator: np.random.Generator) -> np.ndarray:
    """Return a random square of a random photograph, half as bright, (side, side, 3)."""
    photograph = photographs[generator.integers(len(photographs))]
    size = int(generator.integers(min(photograph.shape[:2]) // 3, min(photograph.shape[:2])))
    top, left = (int(generator.integers(length - size + 1)) for length in photograph.shape[:2])
    square = Image.fromarray(photograph[top : top + size, left : left + size])
    return np.array(square.resize((side, side), Image.Resampling.BILINEAR)) // 2


def _places(side: int, generator: np.random.Generator) -> list[tuple[int, int, int]]:
    """Left, top and side of squares that hardly overlap; one at least."""
    places: list[tuple[int, int, int]] = []
    for _ in range(generator.integers(1, _MOST + 1)):
        size = int(side * generator.uniform(*_SIDES))
        left, top = (int(v) for v in generator.integers(side - size + 1, size=2))
        if all(_common((left, top, size), other) <= _OVERLAP * min(size, other[2]) ** 2 for other in places):
            places.append((left, top, size))
    return places


def _common(one: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    """Pixels in both squares."""
    sides = (min(one[i] + one[2], other[i] + other[2]) - max(one[i], other[i]) for i in (0, 1))
    width, height = (max(0, length) for length in sides)
    return width * height


def _draw(
    pixels: np.ndarray, scan: np.ndarray, place: tuple[int, int, int], generator: np.random.Generator
) -> list[int]:
    """Draw a digit in a random bright colour; return the box of its ink, left, top, width and height."""
    left, top, size = place
    ink = Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    share = np.array(ink, dtype=np.float32)[..., None] / 255
    colour = generator.uniform(160, 255, 3)
    under = pixels[top : top + size, left : left + size]
    pixels[top : top + size, left : left + size] = (share * colour + (1 - share) * under).astype(np.uint8)
    rows, columns = (np.flatnonzero((share[..., 0] > 0.3).any(axis)) for axis in (1, 0))
    first = [left + int(columns[0]), top + int(rows[0])]
    return [*first, int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1]

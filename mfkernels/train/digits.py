"""A small real dataset that needs no download: scikit-learn's handwritten digits as a folder of PNGs."""

from pathlib import Path

import numpy as np
from PIL import Image

TEST_EVERY = 6  # one of so many images is for validation


def write(folder: Path, side: int = 32) -> int:
    """Write the 1,797 digits into `train/CLASS/*.png` and `validation/CLASS/*.png`.

    Args:
        folder: made if it is missing.
        side: of the images in pixels; scikit-learn's have 8.

    Returns:
        The number of images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "validation" if index % TEST_EVERY == 0 else "train"
        path = folder / split / str(target) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((image * (255 / 16)).astype(np.uint8))
        pixels.resize((side, side), Image.Resampling.BICUBIC).save(path)
    return len(digits.target)

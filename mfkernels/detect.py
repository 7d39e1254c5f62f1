"""The command `mfkernels detect`: an end-to-end detector on a photo, its boxes drawn and written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .boxes import postprocess
from .demo import MEAN, STD, open_photo
from .models import create_model
from .models.checkpoints import find_tensors, read_checkpoint

SHORT, LONG = 800, 1333  # pixels that the sides of a photo are brought to, at most: the paper's


def run(
    name: str, photo: Path, checkpoint: Path | None, threshold: float, output: Path
) -> list[dict[str, Any]]:
    """Detect objects in a photo, draw their boxes into detect.png, and write them as detect.json.

    Args:
        name: one of `mfkernels.models.list_detectors()`.
        photo: path of the photo.
        checkpoint: path of weights, of any number of classes and queries; None for random ones, which find
            nothing that is there.
        threshold: of the scores, in 0..1.
        output: folder of both files; made if missing.

    Returns:
        What is in detect.json, COCO's form of results: a dictionary for each object of `image_id` (the number
        that is the photo's name, else the name), `category_id` (the label), `bbox` (left, top, width and
        height in the photo's pixels) and `score`.

    Raises:
        OSError: the photo or the checkpoint cannot be read, or the folder cannot be written.
        ValueError: the checkpoint or the threshold does not fit.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    picture = open_photo(photo)
    torch.manual_seed(0)
    model = create_model(name, checkpoint=checkpoint, **_sizes(checkpoint)).eval()
    with torch.inference_mode():
        found = postprocess(model(prepare(picture)), [picture.size[::-1]], threshold)[0]
    results = _as_coco(photo, found)
    output.mkdir(parents=True, exist_ok=True)
    (output / "detect.json").write_text(json.dumps(results, indent=2) + "\n")
    _draw(picture, results)
    picture.save(output / "detect.png")
    weights = checkpoint or "random weights, which find nothing that is there"
    print(f"{name}, {weights}: {len(results)} objects with a score above {threshold:g}")
    print(f"written: {output / 'detect.json'}, {output / 'detect.png'}")
    return results


def prepare(photo: Image.Image) -> Tensor:
    """Return the photo as detectors take it, (1, 3, H, W), normalised.

    The shorter side has 800 pixels, or the longer one 1333 if that is less.
    """
    scale = min(SHORT / min(photo.size), LONG / max(photo.size))
    size = [max(1, round(side * scale)) for side in photo.size]
    pixels = torch.from_numpy(np.array(photo.resize(size, Image.Resampling.BILINEAR)))
    return ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None].contiguous()


def _sizes(checkpoint: Path | None) -> dict[str, Any]:
    """Return the numbers of classes and queries that a detector's weights are for."""
    if checkpoint is None or not checkpoint.is_file():
        return {}
    tensors = find_tensors(read_checkpoint(checkpoint))
    if not {"classify.bias", "content"} <= set(tensors):
        return {}
    return dict(num_classes=len(tensors["classify.bias"]) - 1, queries=len(tensors["content"]))


def _as_coco(photo: Path, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    image = int(photo.stem) if photo.stem.isascii() and photo.stem.isdigit() else photo.stem
    values = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True)
    return [
        dict(image_id=image, category_id=label, bbox=[left, top, right - left, bottom - top], score=score)
        for score, label, (left, top, right, bottom) in values
    ]


def _draw(picture: Image.Image, results: list[dict[str, Any]]) -> None:
    pen = ImageDraw.Draw(picture)
    for result in results:
        left, top, width, height = result["bbox"]
        pen.rectangle((left, top, left + width, top + height), outline="red", width=2)
        pen.text((left + 4, top + 2), f"{result['category_id']}: {result['score']:.2f}", fill="red")

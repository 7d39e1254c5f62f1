"""Writes deployed networks for networks.cpp, and what they are to give: networks.py FOLDER NAME ..."""

import copy
import sys
from pathlib import Path

import torch

import mfkernels
from mfkernels.bench.run import randomise

SIZES = ((1, 96, 96), (2, 65, 97), (1, 7, 60), (1, 1, 1))
CLASSES = 10


def write(folder: Path, name: str) -> None:
    """Write NAME.plan, NAME.weights and NAME.images: for each size its numbers, the images, and the outputs
    of the plain network in float32 and in float64."""
    torch.manual_seed(0)
    model = mfkernels.models.create_model(name, num_classes=CLASSES)
    randomise(model)
    deployed = mfkernels.deploy(model.eval())
    deployed.plan[3:].numpy().tofile(folder / f"{name}.plan")
    deployed.weights.numpy().tofile(folder / f"{name}.weights")
    wide, numbers = copy.deepcopy(model).double(), []
    with torch.inference_mode(), mfkernels.use_backend("reference"):
        for seed, size in enumerate(SIZES):
            x = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(seed))
            numbers += [torch.tensor(size), x, model(x), wide(x.double())]
    torch.cat([part.flatten().float() for part in numbers]).numpy().tofile(folder / f"{name}.images")


for name in sys.argv[2:]:
    write(Path(sys.argv[1]), name)

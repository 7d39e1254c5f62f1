"""Writes the plans and the weights of small deployed networks for threads.cpp: plan.py FOLDER"""

import sys
from pathlib import Path

import mfkernels
from mfkernels.bench.run import randomise

for name in ("mobile_former_26m", "dmf_96"):
    model = mfkernels.models.create_model(name, num_classes=10)
    randomise(model)
    deployed = mfkernels.deploy(model.eval())
    deployed.plan[3:].numpy().tofile(Path(sys.argv[1]) / f"{name}.plan")
    deployed.weights.numpy().tofile(Path(sys.argv[1]) / f"{name}.weights")

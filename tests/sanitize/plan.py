"""Writes the plan and the weights of a small deployed network for threads.cpp: plan.py PLAN WEIGHTS"""

import sys

import mfkernels
from mfkernels.bench.run import randomise

model = mfkernels.models.create_model("mobile_former_26m", num_classes=10)
randomise(model)
deployed = mfkernels.deploy(model.eval())
deployed.plan.numpy().tofile(sys.argv[1])
deployed.weights.numpy().tofile(sys.argv[2])

import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import mfkernels


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and PyTorch finds none"))


@pytest.fixture(params=mfkernels.native.ISAS)
def instruction_set(request):
    """Runs the test once for each instruction set that this machine can run."""
    if request.param not in mfkernels.native.supported_instruction_sets():
        pytest.skip(f"this machine cannot run {request.param} kernels")
    before = mfkernels.native.instruction_set()
    mfkernels.native.set_instruction_set(request.param)
    yield request.param
    mfkernels.native.set_instruction_set(before)

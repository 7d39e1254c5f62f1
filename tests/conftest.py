import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import mfkernels

# Test processes side by side share the cores: threads of theirs would wait for one another.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


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

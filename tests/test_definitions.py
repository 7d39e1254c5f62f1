import pytest
import torch

import mfkernels


@pytest.mark.parametrize("isa", mfkernels.native.supported_instruction_sets())
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dynamic_relu_with_two_fixed_slopes_is_a_leaky_relu(isa, memory_format):
    before = mfkernels.native.instruction_set()
    mfkernels.native.set_instruction_set(isa)
    try:
        x = torch.randn(2, 5, 7, 3).contiguous(memory_format=memory_format)
        slopes = torch.tensor([1.0, 0.25]).view(1, 2, 1).expand(2, 2, 5)
        y = mfkernels.ops.dynamic_relu(x, slopes)
        assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.25))
    finally:
        mfkernels.native.set_instruction_set(before)

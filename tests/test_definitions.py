"""Cases whose result is known without any implementation."""

import pytest
import torch

import mfkernels

formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@formats
def test_dynamic_relu_with_two_fixed_slopes_is_a_leaky_relu(memory_format, instruction_set):
    x = torch.randn(2, 5, 7, 3).contiguous(memory_format=memory_format)
    slopes = torch.tensor([1.0, 0.25]).view(1, 2, 1).expand(2, 2, 5)
    y = mfkernels.ops.dynamic_relu(x, slopes)
    assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.25))


@formats
def test_attention_of_queries_that_are_zero_is_the_mean(memory_format, instruction_set):
    x = torch.randn(2, 6, 9, 11).double().contiguous(memory_format=memory_format)
    out = mfkernels.ops.mobile_to_former_attention(x, torch.zeros(2, 3, 6).double(), 2)
    torch.testing.assert_close(out, x.mean((2, 3))[:, None].expand(2, 3, 6))


@formats
def test_attention_over_one_token_adds_its_value(memory_format, instruction_set):
    x = torch.randn(2, 6, 9, 11).contiguous(memory_format=memory_format)
    k, v = torch.randn(2, 1, 6), torch.randn(2, 1, 6)
    y = mfkernels.ops.former_to_mobile_attention(x, k, v, 2)
    assert torch.equal(y, x + v[:, 0, :, None, None])

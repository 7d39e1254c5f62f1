"""The operators at every shape that a layer of the released networks has, for images of 224x224."""

import pytest
import torch
from cases import modules
from family_layers import fill, layers
from tolerance import Errors


def test_the_table_has_every_operator():
    table = layers()
    assert set(table) == {op.NAME for op in modules()}
    assert sum(map(len, table.values())) > 300


def _run(function, arguments: list, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The first output and the gradients of all tensors."""
    tensors = [isinstance(a, torch.Tensor) for a in arguments]
    values = [a.to(dtype).requires_grad_() if t else a for a, t in zip(arguments, tensors, strict=True)]
    out = function(*values)
    out = out[0] if isinstance(out, tuple) else out
    inputs = [value for value, t in zip(values, tensors, strict=True) if t]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    grads = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    results = {f"gradient {i}": grad for i, grad in enumerate(grads) if grad is not None}
    return {"output": out.detach()} | results


@pytest.mark.parametrize("name", [op.NAME for op in modules()])
def test_layer_shapes(name):
    """float32, outputs and gradients, under the one tolerance for all layers of an operator together."""
    op = next(op for op in modules() if name == op.NAME)
    kernel = getattr(torch.ops.mfkernels, name)
    errors: dict[str, Errors] = {}
    for index, layer in enumerate(layers()[name]):
        generator = torch.Generator().manual_seed(index)
        arguments = fill(layer, generator)
        truth = _run(op.REFERENCE, arguments, torch.float64)
        plain = _run(op.REFERENCE, arguments, torch.float32)
        ours = _run(kernel, arguments, torch.float32)
        assert truth["output"].isfinite().all()
        for key, value in truth.items():
            own = errors.setdefault(key, Errors())
            own.reference(plain[key], value)
            own.kernel(ours[key], value)
    for key, own in errors.items():
        own.check(f"{name} {key}")

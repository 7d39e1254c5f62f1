"""The operators at every shape that a layer of the released networks has, for images of 224x224."""

import functools

import pytest
import torch
from cases import modules
from tolerance import Errors
from torch.utils._python_dispatch import TorchDispatchMode

import mfkernels
from mfkernels.models import create_model, list_models

Layer = tuple  # an operator's arguments, shapes in the place of tensors


class Recorder(TorchDispatchMode):
    """Notes what our operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, set[Layer]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mfkernels":
            name = function.name().split("::")[1].split(".")[0]
            self.layers.setdefault(name, set()).add(tuple(_plain(a) for a in args))
        return function(*args, **kwargs or {})


def _plain(value):
    if isinstance(value, torch.Tensor):
        return ("tensor", *value.shape)
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def layers() -> dict[str, list[Layer]]:
    """The table, made from the networks' configurations: nothing is computed, on the meta device."""
    with Recorder() as recorder, mfkernels.use_backend("cpu"), torch.device("meta"), torch.no_grad():
        for name in list_models():
            if not name.endswith("_faster"):
                create_model(name).eval()(torch.empty(1, 3, 224, 224))
    return {name: sorted(found, key=repr) for name, found in recorder.layers.items()}


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


def _fill(layer: Layer, generator: torch.Generator) -> list:
    """Random arguments; matrices and kernels scaled so that sums are of the order of one."""
    arguments = []
    for value in layer:
        if isinstance(value, tuple) and value[:1] == ("tensor",):
            shape = value[1:]
            width = max(1, shape[-1] if len(shape) == 2 else torch.Size(shape[1:]).numel() if shape else 1)
            scale = width**-0.5 if len(shape) in (2, 5) else 1.0
            value = scale * torch.randn(shape, generator=generator)
        arguments.append(list(value) if isinstance(value, tuple) else value)
    return arguments


@pytest.mark.parametrize("name", [op.NAME for op in modules()])
def test_layer_shapes(name):
    """float32, outputs and gradients, under the one tolerance for all layers of an operator together."""
    op = next(op for op in modules() if name == op.NAME)
    kernel = getattr(torch.ops.mfkernels, name)
    errors: dict[str, Errors] = {}
    for index, layer in enumerate(layers()[name]):
        generator = torch.Generator().manual_seed(index)
        arguments = _fill(layer, generator)
        truth = _run(op.REFERENCE, arguments, torch.float64)
        plain = _run(op.REFERENCE, arguments, torch.float32)
        ours = _run(kernel, arguments, torch.float32)
        for key, value in truth.items():
            own = errors.setdefault(key, Errors())
            own.reference(plain[key], value)
            own.kernel(ours[key], value)
    for key, own in errors.items():
        own.check(f"{name} {key}")

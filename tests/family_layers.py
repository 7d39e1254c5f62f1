"""What the layers of the released networks call our operators with."""

import functools
from collections.abc import Sequence

import torch
from torch.nn import BatchNorm1d
from torch.utils._python_dispatch import TorchDispatchMode

import mfkernels
from mfkernels.models import create_model, list_models
from mfkernels.nn import KernelAttention

Layer = tuple  # an operator's arguments, ("tensor", *shape) in the place of tensors


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
def layers(batch: int = 1, networks: Sequence[str] | None = None) -> dict[str, list[Layer]]:
    """Of every network, or of these, in eval and in train mode, on images of 224x224. Made from the networks'
    configurations: nothing is computed, on the meta device."""
    names = networks or [name for name in list_models() if not name.endswith("_faster")]
    with Recorder() as recorder, mfkernels.use_backend("cpu"), torch.device("meta"), torch.no_grad():
        for name in names:
            model = create_model(name).eval()
            model(torch.empty(batch, 3, 224, 224))
            model.train()
            for module in model.modules():
                if isinstance(module, BatchNorm1d | KernelAttention):
                    module.eval()  # in a batch of one they have one number to measure
            model(torch.empty(batch, 3, 224, 224))
    return {name: sorted(found, key=repr) for name, found in recorder.layers.items()}


def is_tensor(value: object) -> bool:
    return isinstance(value, tuple) and value[:1] == ("tensor",)


def fill(layer: Layer, generator: torch.Generator) -> list:
    """Random arguments; matrices and kernels scaled so that sums are of the order of one."""
    arguments = []
    for value in layer:
        if is_tensor(value):
            shape = value[1:]
            width = max(1, shape[-1] if len(shape) == 2 else torch.Size(shape[1:]).numel() if shape else 1)
            scale = width**-0.5 if len(shape) in (2, 5) else 1.0
            value = scale * torch.randn(shape, generator=generator)
            if len(shape) == 1:
                value = value.abs() + 0.5  # it may be a variance
        arguments.append(list(value) if isinstance(value, tuple) else value)
    return arguments

"""One file an operator: the samples on which `tests/test_contract.py` holds it to the common promises.

A file defines
    OP, REFERENCE: the public function and its plain definition
    NAME:          of the registered operator, torch.ops.mfkernels.NAME
    CHOSEN:        shapes worth naming, a list of dicts
    random_shape(rng: random.Random) -> dict
    make(shape, generator) -> Sample       normal numbers, float64
    make_exact(generator) -> list[Sample]  small integers with results that are exact in every dtype
    native(sample) -> tuple                arguments of torch.ops.mfkernels.NAME
"""

import importlib
import pkgutil
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Tensors by argument name (None where left out), and the other arguments: numbers, and tensors that have
    no gradient and keep their dtype and strides."""

    tensors: dict[str, Tensor | None]
    others: dict = field(default_factory=dict)

    def map(self, function) -> "Sample":
        return replace(self, tensors={k: None if v is None else function(v) for k, v in self.tensors.items()})

    def given(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.tensors.items() if v is not None}

    def call(self, op):
        device = next(iter(self.given().values())).device
        others = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.others.items()}
        return op(**self.tensors, **others)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator).double()


def modules() -> list[ModuleType]:
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]

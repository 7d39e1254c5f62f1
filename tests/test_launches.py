"""How many kernels a GPU would be asked to run, counted without one: a budget that can only fall.

The launches of Triton's kernels are noted in the place of being made; the other operators of PyTorch, except
for those that only look at memory or take it, are one launch each."""

import copy
import importlib
import os
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from cases import modules
from torch.utils._python_dispatch import TorchDispatchMode

import mfkernels
from mfkernels.deploy.folding import fold_batch_norms
from mfkernels.deploy.gpu import by_kernel, fused_block
from mfkernels.deploy.gpu.fused_block import forms
from mfkernels.models import create_model
from mfkernels.operators.dispatch import _functions

pytest.importorskip("triton", reason="Triton is not installed")
from triton_compile import launched

# Of the first of each operator's chosen shapes in float32: forward, and forward with backward.
OPERATORS = {
    "batch_norm": (3, 6),
    "dynamic_conv2d": (1, 8),
    "dynamic_relu": (1, 4),
    "former_block": (1, 15),
    "former_to_mobile_attention": (1, 3),
    "global_response_norm": (3, 7),
    "mobile_to_former_attention": (2, 12),
    "modulation_attention": (1, 12),
    "pointwise_conv_bn": (1, 6),
    "token_hyper": (1, 21),
}
# Of a network in eval mode, with its norms folded as `deploy` does, and in the other forms without CUDA C++
# kernels that it tries; at batch 1 and 2.
NETWORKS = {
    "mobile_former_26m": ((243, 211, 114), (261, 229, 116)),
    "dmf_xxs": ((543, 486, 272, 220), (543, 486, 272, 220)),
    "iformer_t": ((182, 120, 73), (182, 120, 73)),
}


class _Launches(TorchDispatchMode):
    """Counts them by name. Our operators' functions for GPUs are called from here, so that what they call is
    seen, too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._ours = {name: f for op in modules() for name, f in _functions(op.NAME)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if function.namespace == "mfkernels":
            with self:
                return self._ours[name](*args, **kwargs or {})
        out = function(*args, **kwargs or {})
        if launched(function, args, out):
            self.counts[name] += 1
        return out


def launches(run: Callable[[], object]) -> int:
    """How many there are in a call of `run`."""
    for op in modules():
        module = importlib.import_module(f"mfkernels.operators.{op.NAME}.triton")
    kernel = next(value for name, value in vars(module).items() if name.endswith("_kernel"))
    with (
        _Launches() as noted,
        mock.patch.object(type(kernel), "run", lambda kernel, *_, **__: noted.counts.update([kernel.fn])),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # only so that CPU tensors are let through
        mfkernels.use_backend("triton"),
    ):
        run()
    return noted.counts.total()


@pytest.mark.parametrize("op", modules(), ids=lambda op: op.NAME)
def test_operators(op):
    sample = op.make(op.CHOSEN[0], torch.Generator().manual_seed(0)).map(torch.Tensor.float)
    forward = launches(lambda: sample.call(op.OP))
    sample = sample.map(torch.Tensor.requires_grad_)

    def train():
        outputs = sample.call(op.OP)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y.requires_grad]
        grads = [y.detach() for y in outputs]
        torch.autograd.grad(outputs, list(sample.given().values()), grads, allow_unused=True)

    assert (forward, launches(train)) == OPERATORS[op.NAME]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, monkeypatch):
    model = create_model(name).eval()
    copied = copy.deepcopy(model)
    folded = copied.fuse() if name.startswith("iformer") else fold_batch_norms(copied)
    monkeypatch.setattr(fused_block, "CUDA_LACKS", "a compiler")
    monkeypatch.setattr(by_kernel, "has_kernels", lambda x: True)
    networks = [model, *forms(folded, torch.float32)]
    counts = []
    torch.set_flush_denormal(True)  # results that no kernel wrote are full of them, and slow
    try:
        for batch in (1, 2):
            x = torch.randn(batch, 3, 64, 64)
            with torch.no_grad():
                counts.append(tuple(launches(lambda net=net, x=x: net(x)) for net in networks))
    finally:
        torch.set_flush_denormal(False)
    assert tuple(counts) == NETWORKS[name]

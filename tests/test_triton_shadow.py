"""No program of a Triton kernel reads or writes what another program of its launch writes."""

import importlib.util
import random

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from cases import modules
from test_activated_depthwise import SHAPES, make
from test_activated_depthwise import run as activated_depthwise
from test_contract import Comparison, expect
from triton_shadow import Race, shadowed

from mfkernels.operators.dispatch import triton_interpreted

pytestmark = pytest.mark.skipif(
    not triton_interpreted(), reason="kernels run on the GPU here, not interpreted"
)


@triton.jit
def _write(out, shared: tl.constexpr):
    tl.store(out + (0 if shared else tl.program_id(0)), 1.0)


@triton.jit
def _pass_on(x, of: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x + program, tl.load(x + (program + of) % 2) + 1.0)


@triton.jit
def _add(out):
    tl.atomic_add(out, 1.0)


def test_races_are_found():
    out = torch.zeros(2)
    with shadowed():
        _write[(2,)](out, False)
        _pass_on[(2,)](out, 0)
        with pytest.raises(Race, match="_write: two programs write"):
            _write[(2,)](out, True)
        with pytest.raises(Race, match="_pass_on: a program reads what another one writes"):
            _pass_on[(2,)](out, 1)
        with pytest.raises(Exception, match="an atomic operation"):
            _add[(2,)](out)
    _write[(2,)](out, True)


@pytest.mark.parametrize("op", modules(), ids=lambda op: op.NAME)
def test_kernels_have_no_races(op):
    """Forward and backward, of small shapes by chance."""
    with shadowed():
        comparison = Comparison(op, torch.float32, "triton")
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            sample = op.make(op.random_shape(random.Random(seed)), generator)
            comparison.add(expect(op, sample, generator, torch.float32))
        comparison.check("shadowed")


def test_the_kernel_of_deployed_networks_has_no_races():
    with shadowed():
        for shape in SHAPES[:4]:
            x, *others = make(shape, torch.Generator().manual_seed(0))
            activated_depthwise(x, *others)

import random

import torch

from mfkernels.operators.modulation_attention import modulation_attention, modulation_attention_reference

from . import Sample, integers, normal

NAME = "modulation_attention"
OP, REFERENCE = modulation_attention, modulation_attention_reference

CHOSEN = [
    # of the networks
    dict(B=1, D=48, C=96, H=14, W=14),
    dict(B=2, D=44, C=176, H=7, W=7),
    dict(B=1, D=32, C=64, H=16, W=24, window=8),
    # edges
    dict(B=0, D=4, C=3, H=3, W=3),
    dict(B=1, D=4, C=3, H=0, W=3),
    dict(B=1, D=3, C=0, H=2, W=3),
    dict(B=1, D=1, C=1, H=1, W=1, form="paper"),
    dict(B=2, D=8, C=5, H=1, W=33, form="paper", scale=0.5),
    dict(B=3, D=17, C=34, H=12, W=6, window=3, form="paper"),
    dict(B=1, D=9, C=16, H=5, W=5, window=1, scale=-1.0),
    dict(B=1, D=384, C=20, H=4, W=9, scale=0.0),
    dict(B=1, D=8, C=4, H=37, W=29),
]


def random_shape(rng: random.Random) -> dict:
    window = rng.choice([None, None, 1, 2, 3])
    by = window or 1
    return dict(
        B=rng.choice([1, 1, 2, 3]), D=rng.randint(1, 24), C=rng.randint(1, 40),
        H=by * rng.randint(1, 9 // by), W=by * rng.randint(1, 12 // by), window=window,
        form=rng.choice(["released", "released", "paper"]), scale=rng.choice([None, None, 0.3]),
    )  # fmt: skip


def _others(shape) -> dict:
    return dict(
        scale=shape.get("scale"),
        form=shape.get("form", "released"),
        window_size=_window(shape),
    )


def _window(shape) -> int | None:
    """None where a test has changed the size of the map."""
    window = shape.get("window")
    return window if window and shape["H"] % window == 0 and shape["W"] % window == 0 else None


def make(shape, generator) -> Sample:
    B, D, C, H, W = (shape[k] for k in ("B", "D", "C", "H", "W"))
    sizes = dict(q=D, k=D, v=C, gate=C)
    return Sample({name: normal(generator, B, n, H, W) for name, n in sizes.items()}, _others(shape))


def make_exact(generator) -> list[Sample]:
    """Attention that is exactly uniform over 16 pixels, sigmoids that are 1/2 (and, in the paper's form, a
    mean of zero), or 0 and 1: beyond 1000."""
    zeros = torch.zeros(2, 6, 4, 4, dtype=torch.float64)
    switches = 2048 * (2 * integers(generator, 0, 1, 2, 5, 4, 4) - 1)
    signs = torch.ones(2, 5, 4, 4, dtype=torch.float64)
    signs[:, :, ::2] = -1
    off = torch.zeros(2, 5, 4, 4, dtype=torch.float64)
    return [
        Sample(dict(q=zeros, k=zeros, v=switches, gate=switches.flip(1)), dict(scale=1.0)),
        Sample(dict(q=zeros, k=zeros, v=off, gate=off), dict(scale=1.0, window_size=2)),
        Sample(dict(q=zeros, k=zeros, v=signs, gate=off), dict(scale=1.0, form="paper")),
    ]


def native(sample: Sample) -> tuple:
    return (*sample.tensors.values(), *sample.others.values())

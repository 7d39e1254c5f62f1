import random

import torch

from mfkernels.operators.batch_norm import batch_norm, batch_norm_reference

from . import Sample, integers, normal

NAME = "batch_norm"
OP, REFERENCE = batch_norm, batch_norm_reference

CHOSEN = [
    # of the networks
    dict(B=2, C=24, H=28, W=28, measured=True, activation="gelu"),
    dict(B=1, C=96, H=14, W=14, measured=False, activation="gelu"),
    dict(B=2, C=320, H=7, W=7, measured=True, activation="none"),
    # edges
    dict(B=0, C=4, H=3, W=3, measured=False, activation="gelu"),
    dict(B=1, C=3, H=0, W=5, measured=False, activation="none"),
    dict(B=2, C=1, H=1, W=1, measured=True, activation="none", eps=0.1),
    dict(B=1, C=5, H=97, W=61, measured=True, activation="gelu"),
    dict(B=3, C=33, H=1, W=7, measured=True, activation="gelu", eps=0.5),
    dict(B=3, C=16, H=7, W=1, measured=False, activation="none", eps=0.5),
]


def random_shape(rng: random.Random) -> dict:
    return dict(
        B=rng.choice([1, 2, 2, 3]), C=rng.randint(4, 40), H=rng.randint(3, 14), W=rng.randint(3, 14),
        measured=rng.choice([True, False]), activation=rng.choice(["none", "gelu"]),
        eps=rng.choice([1e-5, 0.1]),
    )  # fmt: skip


def make(shape, generator) -> Sample:
    B, C, H, W = (shape[k] for k in "BCHW")
    statistics = (None, None)
    if not shape["measured"]:
        statistics = normal(generator, C), normal(generator, C).square() + 0.5
    tensors = dict(x=normal(generator, B, C, H, W), weight=normal(generator, C), bias=normal(generator, C))
    tensors |= dict(mean=statistics[0], variance=statistics[1])
    return Sample(tensors, dict(eps=shape.get("eps", 1e-5), activation=shape["activation"]))


def make_exact(generator) -> list[Sample]:
    """Measured: as many 2 as -2 around 3, so that the deviation is 2. Given: a deviation of 2, and a GELU of
    numbers so large that it is the identity."""
    x = torch.tensor([2.0, -2.0]).repeat(8).view(2, 1, 2, 4).double().repeat(1, 8, 1, 1) + 3
    weight, bias = 4 * integers(generator, -3, 3, 8), integers(generator, -3, 3, 8)
    mean, variance = integers(generator, -3, 3, 8), torch.full((8,), 3.0).double()
    none = dict(mean=None, variance=None)
    return [
        Sample(dict(x=x, weight=weight, bias=bias, **none), dict(eps=0.0, activation="none")),
        Sample(
            dict(x=x, weight=weight, bias=bias, mean=mean, variance=variance),
            dict(eps=1.0, activation="none"),
        ),
        Sample(
            dict(x=x, weight=weight, bias=bias + 100, mean=mean, variance=variance),
            dict(eps=1.0, activation="gelu"),
        ),
    ]


def native(sample: Sample) -> tuple:
    return (*sample.tensors.values(), *sample.others.values())

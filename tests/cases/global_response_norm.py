import random

import torch

from mfkernels.operators.global_response_norm import global_response_norm, global_response_norm_reference

from . import Sample, integers, normal

NAME = "global_response_norm"
OP, REFERENCE = global_response_norm, global_response_norm_reference

CHOSEN = [
    # of the networks
    dict(B=2, C=67, H=56, W=56, mean="released"),
    dict(B=1, C=194, H=28, W=28, mean="released"),
    dict(B=2, C=384, H=7, W=7, mean="channels"),
    # edges
    dict(B=0, C=4, H=3, W=3, mean="channels"),
    dict(B=1, C=3, H=0, W=5, mean="channels"),
    dict(B=1, C=1, H=1, W=1, mean="released"),
    dict(B=1, C=1, H=97, W=61, mean="channels"),
    dict(B=3, C=33, H=1, W=7, mean="channels", eps=0.5),
    dict(B=3, C=16, H=7, W=1, mean="released", eps=0.5),
]


def random_shape(rng: random.Random) -> dict:
    return dict(
        B=rng.choice([1, 1, 2, 3]), C=rng.randint(1, 40), H=rng.randint(1, 14), W=rng.randint(1, 14),
        mean=rng.choice(["channels", "released"]), eps=rng.choice([1e-6, 0.1]),
    )  # fmt: skip


def _others(shape) -> dict:
    return dict(mean=shape["mean"], eps=shape.get("eps", 1e-6))


def make(shape, generator) -> Sample:
    B, C, H, W = (shape[k] for k in "BCHW")
    return Sample(
        dict(x=normal(generator, B, C, H, W), gamma=normal(generator, C), beta=normal(generator, C)),
        _others(shape),
    )


def make_exact(generator) -> list[Sample]:
    """Norms that are all 8: sixteen pixels of 2 or -2; or channels of zeros, with eps = 1."""
    x = 2 * (2 * integers(generator, 0, 1, 2, 8, 4, 4) - 1)
    gamma, beta = integers(generator, -3, 3, 8), integers(generator, -3, 3, 8)
    zeros = torch.zeros(2, 8, 4, 4, dtype=torch.float64)
    return [
        Sample(dict(x=x, gamma=gamma, beta=beta), dict(mean="channels", eps=0.0)),
        Sample(dict(x=x, gamma=gamma, beta=beta), dict(mean="released", eps=8.0)),
        Sample(dict(x=zeros, gamma=gamma, beta=beta + 4), dict(mean="channels", eps=1.0)),
    ]


def native(sample: Sample) -> tuple:
    return (*sample.tensors.values(), *sample.others.values())

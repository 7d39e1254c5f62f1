import random

import torch

from mfkernels.operators.pointwise_conv_bn import pointwise_conv_bn, pointwise_conv_bn_reference

from . import Sample, integers, normal

NAME = "pointwise_conv_bn"
OP, REFERENCE = pointwise_conv_bn, pointwise_conv_bn_reference

CHOSEN = [
    # of the networks
    dict(B=1, C=48, O=192, H=28, W=28, activation="gelu"),
    dict(B=1, C=384, O=96, H=14, W=14, activation="none"),
    dict(B=2, C=300, O=40, H=7, W=7, activation="none"),
    # edges
    dict(B=0, C=4, O=3, H=3, W=3, activation="gelu"),
    dict(B=2, C=1, O=1, H=1, W=1, activation="none", eps=0.1),
    dict(B=3, C=5, O=13, H=97, W=61, activation="gelu"),
    dict(B=3, C=33, O=7, H=1, W=7, activation="gelu", eps=0.5),
    dict(B=2, C=17, O=9, H=5, W=10, activation="none"),
]


def random_shape(rng: random.Random) -> dict:
    return dict(
        B=rng.choice([1, 2, 2, 3]), C=rng.randint(4, 40), O=rng.randint(12, 40), H=rng.randint(3, 14),
        W=rng.randint(3, 14), activation=rng.choice(["none", "gelu"]), eps=rng.choice([1e-5, 0.1]),
    )  # fmt: skip


def make(shape, generator) -> Sample:
    B, C, outputs, H, W = (shape[k] for k in "BCOHW")
    tensors = dict(
        x=normal(generator, B, C, H, W),
        weight=normal(generator, outputs, C, 1, 1) / C**0.5,
        gamma=normal(generator, outputs),
        beta=normal(generator, outputs),
        mean=normal(generator, outputs),
        variance=normal(generator, outputs).square() + 0.5,
    )
    return Sample(tensors, dict(eps=shape.get("eps", 1e-5), activation=shape["activation"]))


def make_exact(generator) -> list[Sample]:
    """A deviation of 2; and a GELU of numbers so large that it is the identity."""

    def sample(activation: str, beta: float) -> Sample:
        tensors = dict(
            x=integers(generator, -2, 2, 2, 5, 3, 6),
            weight=integers(generator, -2, 2, 9, 5, 1, 1),
            gamma=2 * integers(generator, -2, 2, 9),
            beta=integers(generator, -3, 3, 9) + beta,
            mean=integers(generator, -3, 3, 9),
            variance=torch.full((9,), 3.0).double(),
        )
        return Sample(tensors, dict(eps=1.0, activation=activation))

    return [sample("none", 0), sample("gelu", 128)]


def native(sample: Sample) -> tuple:
    return (*sample.tensors.values(), *sample.others.values())

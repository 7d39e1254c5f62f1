import random

from mfkernels.operators.dynamic_relu import dynamic_relu, dynamic_relu_reference

from . import Sample, integers, normal

NAME = "dynamic_relu"
OP, REFERENCE = dynamic_relu, dynamic_relu_reference

CHOSEN = [
    # of the networks
    dict(B=1, C=72, H=28, W=28, K=2),
    dict(B=2, C=12, H=56, W=56, K=2),
    dict(B=1, C=72, H=14, W=14, K=2, M=6),
    dict(B=1, C=48, H=28, W=28, K=2, M=3),
    # edges
    dict(B=0, C=4, H=3, W=3, K=2),
    dict(B=1, C=0, H=3, W=3, K=2),
    dict(B=1, C=3, H=0, W=5, K=2),
    dict(B=1, C=1, H=1, W=1, K=1),
    dict(B=2, C=5, H=1, W=7, K=1, M=1, intercepts=True),
    dict(B=1, C=17, H=7, W=1, K=3, intercepts=True),
    dict(B=3, C=33, H=5, W=3, K=4, M=2),
    dict(B=1, C=8, H=4, W=4, K=9, intercepts=True),
    dict(B=1, C=6, H=9, W=11, K=2, M=128),
    dict(B=0, C=6, H=2, W=2, K=2, M=3),
]


def random_shape(rng: random.Random) -> dict:
    return dict(
        B=rng.choice([1, 1, 2, 3]), C=rng.randint(1, 40), H=rng.randint(1, 14), W=rng.randint(1, 14),
        K=rng.choice([1, 2, 2, 3]), M=rng.choice([None, 1, 2, 3, 6, 17]), intercepts=rng.random() < 0.4,
    )  # fmt: skip


def _sample(shape, values) -> Sample:
    B, C, H, W, K, M = *(shape[k] for k in "BCHWK"), shape.get("M")
    coefficients = (B, K, C) if M is None else (B, M, K, C)
    return Sample(
        dict(
            x=values(B, C, H, W),
            slopes=values(*coefficients),
            intercepts=values(*coefficients) if shape.get("intercepts") else None,
            attention=None if M is None else values(B, M, H, W),
        )
    )


def make(shape, generator) -> Sample:
    return _sample(shape, lambda *size: normal(generator, *size))


def make_exact(generator) -> list[Sample]:
    """Integers of at most 3: many ties, where the gradient is split among K functions, K a power of two."""
    shapes = [
        dict(B=2, C=19, H=5, W=7, K=2, intercepts=True),
        dict(B=1, C=16, H=4, W=4, K=1),
        dict(B=2, C=9, H=6, W=5, K=2, M=3),
        dict(B=1, C=21, H=3, W=9, K=2, M=5, intercepts=True),
    ]
    return [_sample(shape, lambda *size: integers(generator, -1, 1, *size)) for shape in shapes]


def native(sample: Sample) -> tuple:
    return tuple(sample.tensors.values())

import random

import torch

from mfkernels.operators.former_to_mobile_attention import (
    former_to_mobile_attention,
    former_to_mobile_attention_reference,
)

from . import Sample, integers, normal

NAME = "former_to_mobile_attention"
OP, REFERENCE = former_to_mobile_attention, former_to_mobile_attention_reference

CHOSEN = [
    # of the networks
    dict(B=1, C=20, H=56, W=56, M=6, heads=2),
    dict(B=1, C=40, H=28, W=28, M=6, heads=2),
    dict(B=2, C=112, H=14, W=14, M=6, heads=2),
    dict(B=2, C=160, H=7, W=7, M=6, heads=2),
    # edges
    dict(B=0, C=4, H=3, W=3, M=2, heads=2),
    dict(B=1, C=4, H=0, W=3, M=2, heads=2),
    dict(B=1, C=1, H=1, W=1, M=1, heads=1),
    dict(B=1, C=7, H=1, W=19, M=3, heads=1, scale=3.0),
    dict(B=1, C=6, H=23, W=1, M=17, heads=6),
    dict(B=1, C=34, H=9, W=13, M=128, heads=2, scale=0.0),
    dict(B=3, C=66, H=5, W=7, M=5, heads=3, scale=-0.5),
]


def random_shape(rng: random.Random) -> dict:
    heads = rng.choice([1, 2, 2, 4])
    return dict(
        B=rng.choice([1, 1, 2, 3]), C=heads * rng.randint(2, 20), H=rng.randint(1, 14), W=rng.randint(1, 14),
        M=rng.choice([1, 2, 3, 6, 17]), heads=heads, scale=rng.choice([None, None, 0.3]),
    )  # fmt: skip


def make(shape, generator) -> Sample:
    B, C, H, W, M = (shape[k] for k in "BCHWM")
    return Sample(
        dict(x=normal(generator, B, C, H, W), k=normal(generator, B, M, C), v=normal(generator, B, M, C)),
        dict(num_heads=shape["heads"], scale=shape.get("scale")),
    )


def make_exact(generator) -> list[Sample]:
    """Attention that is exactly uniform over four tokens, or exactly one token: keys are t e_c, and no pixel
    of channel c is zero, so the logits differ by 2000 or more."""
    x = integers(generator, -8, 8, 2, 12, 5, 7)
    uniform = dict(x=x, k=torch.zeros(2, 4, 12, dtype=torch.float64), v=integers(generator, -8, 8, 2, 4, 12))
    x = x + (x >= 0)  # no zeros
    k = torch.zeros(2, 5, 12, dtype=torch.float64)
    k[:, :, 3] = k[:, :, 7] = torch.arange(5.0)
    one = dict(x=x, k=k, v=integers(generator, -8, 8, 2, 5, 12))
    return [
        Sample(uniform, dict(num_heads=2, scale=1.0)),
        Sample(one, dict(num_heads=2, scale=2048.0)),
    ]


def native(sample: Sample) -> tuple:
    return (*sample.tensors.values(), *sample.others.values())

import random

import torch

from mfkernels.operators.former_block import former_block, former_block_reference

from . import Sample, integers, normal

NAME = "former_block"
OP, REFERENCE = former_block, former_block_reference

CHOSEN = [
    # of the networks
    dict(B=2, T=6, d=192, h=384, heads=4),
    dict(B=1, T=3, d=128, h=256, heads=4),
    dict(B=2, T=6, d=64, h=128, heads=2, form="standard"),
    # edges
    dict(B=0, T=3, d=8, h=8, heads=2),
    dict(B=2, T=0, d=8, h=8, heads=2),
    dict(B=1, T=1, d=1, h=1, heads=1),
    dict(B=5, T=17, d=20, h=0, heads=5),
    dict(B=3, T=9, d=33, h=7, heads=3, biases=False),
    dict(B=7, T=2, d=30, h=50, heads=2, form="standard", biases=True),
    dict(B=1, T=128, d=16, h=16, heads=1),
]


def random_shape(rng: random.Random) -> dict:
    """At least 16 wide and nine tokens: a norm of few values only passes on how they were rounded, and so
    does a sum over few rows that nearly cancel."""
    heads = rng.choice([1, 2, 4])
    form = rng.choice(["released", "standard"])
    return dict(
        B=rng.choice([3, 5, 9]), T=rng.choice([3, 6, 9]), d=heads * rng.randint(16 // heads, 20), heads=heads,
        h=rng.choice([0, 19, 40] if form == "released" else [19, 40]), form=form,
        biases=rng.random() < 0.7,
    )  # fmt: skip


def make(shape, generator) -> Sample:
    B, T, d, h = (shape[k] for k in "BTdh")
    queries = 3 * d if shape.get("form") == "standard" else d

    def linear(outputs, inputs):
        return normal(generator, outputs, inputs) * inputs**-0.5

    def bias(size):
        return normal(generator, size) * 0.1 if shape.get("biases", True) else None

    tensors = dict(
        tokens=normal(generator, B, T, d),
        qkv_weight=linear(queries, d),
        qkv_bias=bias(queries),
        proj_weight=linear(d, d),
        proj_bias=bias(d),
        norm1_weight=1 + 0.1 * normal(generator, d),
        norm1_bias=0.1 * normal(generator, d),
    )
    if h > 0:
        tensors |= dict(
            fc1_weight=linear(h, d),
            fc1_bias=bias(h),
            fc2_weight=linear(d, h),
            fc2_bias=bias(d),
            norm2_weight=1 + 0.1 * normal(generator, d),
            norm2_bias=0.1 * normal(generator, d),
        )
    return Sample(tensors, dict(num_heads=shape["heads"], form=shape.get("form", "released")))


def make_exact(generator) -> list[Sample]:
    """Nothing but the residuals, the biases and a norm of rows that are 1 and -1, with eps = 3: halves."""
    d = 16
    signs = 2 * integers(generator, 0, 1, 2, 4, d // 2) - 1
    tokens = torch.cat([signs, -signs], 2)
    zeros, ones = torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)
    matrix = torch.zeros(d, d, dtype=torch.float64)
    halves = dict(norm1_weight=4 * ones, norm1_bias=integers(generator, -3, 3, d))
    released = dict(
        tokens=tokens, qkv_weight=matrix, qkv_bias=zeros, proj_weight=matrix, proj_bias=zeros, **halves
    )
    standard = dict(
        tokens=tokens,
        qkv_weight=torch.zeros(3 * d, d, dtype=torch.float64),
        qkv_bias=None,
        proj_weight=matrix,
        proj_bias=integers(generator, -3, 3, d),
        norm1_weight=ones,
        norm1_bias=zeros,
        fc1_weight=matrix,
        fc1_bias=None,
        fc2_weight=matrix,
        fc2_bias=integers(generator, -3, 3, d),
        norm2_weight=ones,
        norm2_bias=zeros,
    )
    return [
        Sample(released, dict(num_heads=2, eps=3.0)),
        Sample(standard, dict(num_heads=2, form="standard", eps=3.0)),
    ]


def native(sample: Sample) -> tuple:
    names = [f"{layer}_{part}" for layer in ("fc1", "fc2", "norm2") for part in ("weight", "bias")]
    tensors = sample.tensors | {name: sample.tensors.get(name) for name in names}
    others = dict(eps=1e-5) | sample.others
    return (*tensors.values(), others["num_heads"], others["form"], others["eps"])

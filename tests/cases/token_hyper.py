import random

from mfkernels.operators.token_hyper import token_hyper, token_hyper_reference

from . import Sample, integers, normal

NAME = "token_hyper"
OP, REFERENCE = token_hyper, token_hyper_reference

CHOSEN = [
    # of the networks
    dict(B=1, d=192, h=48, C=(672, 672)),
    dict(B=3, d=128, h=32, C=(72, 96)),
    # edges
    dict(B=0, d=8, h=2, C=(3, 4)),
    dict(B=1, d=1, h=1, C=(1,)),
    dict(B=17, d=40, h=10, C=(7,), m=1),
    dict(B=40, d=33, h=5, C=(70, 1), m=1),
    dict(B=2, d=16, h=70, C=(130,)),
]


def random_shape(rng: random.Random) -> dict:
    """Not the smallest: among a handful of numbers the reference is often exact by luck."""
    return dict(
        B=rng.choice([1, 2, 3, 20]), d=rng.randint(16, 60), h=rng.randint(8, 24), m=rng.choice([1, 2, 2]),
        C=rng.choice([(rng.randint(8, 40),), (rng.randint(8, 40), rng.randint(8, 40))]),
    )  # fmt: skip


def _sample(shape, values) -> Sample:
    B, d, h, m = shape["B"], shape["d"], shape["h"], shape.get("m", 2)
    tensors = dict(token=values(B, d))
    for prefix, channels in zip(("", "other_"), shape["C"], strict=False):
        tensors |= {
            f"{prefix}weight1": values(h, d) * d**-0.5,
            f"{prefix}bias1": values(h),
            f"{prefix}weight2": 4 * values(m * channels, h) * h**-0.5,
            f"{prefix}bias2": values(m * channels),
        }
    return Sample(tensors, dict(num_functions=m))


def make(shape, generator) -> Sample:
    return _sample(shape, lambda *size: normal(generator, *size))


def make_exact(generator) -> list[Sample]:
    """Outputs beyond -3 and 3, where theta is 0 or 1, and no gradient comes through."""
    shape = dict(B=2, d=16, h=16, C=(5, 7))
    beyond = _sample(shape, lambda *size: 8 * integers(generator, 1, 3, *size))
    signs = 2 * integers(generator, 0, 1, 10, 16) - 1
    beyond.tensors["weight2"] = signs * 512
    return [beyond]


def native(sample: Sample) -> tuple:
    others = [f"other_{name}" for name in ("weight1", "bias1", "weight2", "bias2")]
    tensors = sample.tensors | {name: sample.tensors.get(name) for name in others}
    return (*tensors.values(), sample.others["num_functions"])

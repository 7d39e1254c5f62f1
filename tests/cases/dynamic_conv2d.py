import random

from mfkernels.operators.dynamic_conv2d import dynamic_conv2d, dynamic_conv2d_reference

from . import Sample, integers, normal

NAME = "dynamic_conv2d"
OP, REFERENCE = dynamic_conv2d, dynamic_conv2d_reference

CHOSEN = [
    # of the networks: pointwise, grouped pointwise, depthwise
    dict(B=2, C=48, H=14, W=14, O=24, K=4, k=1, groups=1),
    dict(B=1, C=96, H=7, W=7, O=144, K=8, k=1, groups=4),
    dict(B=2, C=72, H=14, W=14, O=72, K=4, k=3, groups=72, padding=1),
    dict(B=1, C=24, H=28, W=28, O=24, K=8, k=3, groups=24, padding=1),
    dict(B=2, C=48, H=14, W=14, O=48, K=0, k=7, groups=48, padding=3),
    # with as many inputs as a few outputs' sums have room for, and the same kernels for all samples
    dict(B=1, C=640, H=5, W=4, O=24, K=8, k=1, groups=1),
    dict(B=2, C=12, H=5, W=5, O=20, K=0, k=1, groups=2),
    # dense kernels with many inputs, on a map too large for a cache, on a large and on a small one
    dict(B=1, C=72, H=62, W=60, O=9, K=2, k=3, groups=1, padding=1, biases=True),
    dict(B=1, C=128, H=20, W=17, O=48, K=2, k=3, groups=1, padding=1, biases=True),
    dict(B=2, C=72, H=9, W=7, O=40, K=2, k=3, groups=2, stride=(1, 2), padding=(2, 1), dilation=(1, 2)),
    # edges
    dict(B=2, C=7, H=9, W=20, O=7, K=2, k=5, groups=7, padding=1, biases=True),
    dict(B=1, C=5, H=30, W=35, O=5, K=2, k=7, groups=5, padding=6),
    dict(B=0, C=4, H=3, W=3, O=6, K=2, k=3, groups=2),
    dict(B=1, C=1, H=1, W=1, O=1, K=1, k=1, groups=1),
    dict(B=1, C=12, H=1, W=1, O=8, K=3, k=3, groups=4, padding=1),
    dict(B=3, C=8, H=7, W=9, O=12, K=2, k=3, groups=2, stride=2, padding=1, biases=True),
    dict(B=2, C=5, H=11, W=8, O=65, K=2, k=(5, 2), groups=1, stride=(3, 2), padding=(4, 1), dilation=(1, 3)),
    dict(B=1, C=130, H=6, W=13, O=3, K=3, k=2, groups=1, stride=4, biases=True),
    dict(B=1, C=6, H=23, W=31, O=12, K=1, k=3, groups=6, dilation=4, padding=5, basis_scale=-2.0),
    dict(B=1, C=3, H=97, W=61, O=2, K=2, k=3, groups=1, padding=1),
]


def random_shape(rng: random.Random) -> dict:
    """Not the smallest: among a handful of weights the reference is often exact by luck."""
    groups = rng.choice([1, 1, 2, 3, 17])
    depthwise = groups == 17
    per_group, least = (1, 9) if depthwise else (rng.randint(4, 9), 1)
    return dict(
        B=rng.choice([2, 3]), C=groups * per_group, H=rng.randint(least, 13), W=rng.randint(least, 13),
        O=groups * (rng.randint(1, 2) if depthwise else rng.randint(4, 9)), K=rng.choice([4, 8]),
        k=rng.choice([3, 5, 7, (2, 3)] if depthwise else [1, 1, 3, (2, 3)]), groups=groups,
        stride=rng.choice([1, 1, 2, (3, 1)]),
        padding=rng.choice([2, (2, 3)]), dilation=rng.choice([1, 1, (1, 2)]), biases=rng.random() < 0.4,
    )  # fmt: skip


def _sample(shape, values) -> Sample:
    B, C, H, W, K, outputs = (shape[k] for k in "BCHWKO")
    k = shape["k"] if isinstance(shape["k"], tuple) else (shape["k"],) * 2
    kernel = (outputs, C // shape["groups"], *k)
    names = ("stride", "padding", "dilation", "groups", "basis_scale")
    defaults = dict(stride=1, padding=0, dilation=1, basis_scale=0.5)
    return Sample(
        dict(
            x=values(B, C, H, W),
            weight=values(*kernel),
            basis=values(K, *kernel),
            attention=values(B, K),
            bias=values(outputs) if shape.get("biases") else None,
            basis_bias=values(K, outputs) if shape.get("biases") else None,
        ),
        {name: (defaults | shape)[name] for name in names},
    )


def make(shape, generator) -> Sample:
    return _sample(shape, lambda *size: normal(generator, *size))


def make_exact(generator) -> list[Sample]:
    shapes = [
        dict(B=2, C=4, H=5, W=7, O=6, K=2, k=3, groups=2, padding=1, biases=True, basis_scale=1.0),
        dict(B=2, C=6, H=4, W=4, O=5, K=2, k=1, groups=1, basis_scale=2.0),
        dict(B=1, C=17, H=5, W=6, O=17, K=1, k=3, groups=17, stride=2, padding=1, basis_scale=1.0),
    ]
    return [_sample(shape, lambda *size: integers(generator, -1, 1, *size)) for shape in shapes]


def native(sample: Sample) -> tuple:
    def pair(value):
        return [value, value] if isinstance(value, int) else list(value)

    settings = {k: pair(v) if k in ("stride", "padding", "dilation") else v for k, v in sample.others.items()}
    return (*sample.tensors.values(), *settings.values())

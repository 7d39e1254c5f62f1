import random

import torch

from mfkernels.operators.mobile_to_former_attention import (
    mobile_to_former_attention,
    mobile_to_former_attention_reference,
)

from . import Sample, integers, normal

NAME = "mobile_to_former_attention"
OP, REFERENCE = mobile_to_former_attention, mobile_to_former_attention_reference

CHOSEN = [
    # of the networks
    dict(B=1, C=12, H=56, W=56, M=6, heads=2),
    dict(B=1, C=40, H=28, W=28, M=6, heads=2, logits=True),
    dict(B=2, C=112, H=14, W=14, M=6, heads=2),
    dict(B=2, C=160, H=7, W=7, M=6, heads=2),
    # edges
    dict(B=0, C=4, H=3, W=3, M=2, heads=2),
    dict(B=1, C=4, H=3, W=3, M=0, heads=2, logits=True),
    dict(B=1, C=1, H=1, W=1, M=1, heads=1, logits=True),
    dict(B=1, C=7, H=1, W=19, M=3, heads=1, scale=3.0),
    dict(B=1, C=6, H=23, W=1, M=17, heads=6, logits=True),
    dict(B=1, C=34, H=9, W=13, M=128, heads=2, scale=0.0),
    dict(B=3, C=66, H=5, W=7, M=5, heads=3, scale=-0.5, logits=True),
    # with a mask
    dict(B=2, C=32, H=21, W=30, M=20, heads=2, mask="padding", logits=True),
    dict(B=2, C=12, H=40, W=37, M=3, heads=2, mask="padding"),
    dict(B=3, C=10, H=6, W=9, M=3, heads=2, mask="scattered", logits=True),
    dict(B=2, C=8, H=5, W=7, M=2, heads=1, mask="one left"),
    dict(B=2, C=6, H=3, W=5, M=2, heads=2, mask="first sample", logits=True),
    dict(B=2, C=24, H=4, W=5, M=4, heads=2, mask="none", logits=True),
]
MASKS = ("padding", "scattered", "one left", "first sample", "none")


def random_shape(rng: random.Random) -> dict:
    heads = rng.choice([1, 2, 2, 4])
    return dict(
        B=rng.choice([1, 1, 2, 3]), C=heads * rng.randint(2, 20), H=rng.randint(1, 14), W=rng.randint(1, 14),
        M=rng.choice([1, 2, 3, 6, 17]), heads=heads, logits=rng.random() < 0.5,
        scale=rng.choice([None, None, 0.3]), mask=rng.choice([None] * 5 + [*MASKS]),
    )  # fmt: skip


def make(shape, generator) -> Sample:
    B, C, H, W, M = (shape[k] for k in "BCHWM")
    x, q = normal(generator, B, C, H, W), normal(generator, B, M, C)
    mask = make_mask(shape.get("mask"), B, H, W, generator)
    if shape.get("mask") in ("scattered", "first sample"):
        x.masked_fill_(mask[:, None], torch.nan)
    others = dict(
        num_heads=shape["heads"], scale=shape.get("scale"), return_logits=shape.get("logits", False)
    )
    return Sample(dict(x=x, q=q), others | dict(mask=mask))


def make_mask(kind: str | None, B: int, H: int, W: int, generator) -> torch.Tensor | None:
    """Around images of random sizes; at random pixels; at all but one; of a whole sample; nowhere."""
    if kind is None:
        return None
    mask = torch.rand(B, H, W, generator=generator) < 0.5
    if kind == "scattered":
        return mask
    mask.zero_()
    for image in mask:
        row, column = (int(torch.randint(n, (), generator=generator)) for n in (H, W))
        if kind == "padding":
            image[row + 1 :] = True
            image[:, column + 1 :] = True
        elif kind == "one left":
            image.fill_(True)
            image[row, column] = False
    if kind == "first sample":
        mask[:1] = True
    return mask


def make_exact(generator) -> list[Sample]:
    """Attention that is exactly uniform over 64 pixels or over half of them, or exactly one pixel: all values
    of a channel differ, and the query, one channel, makes the logits differ by 2000 or more."""
    uniform = dict(x=8 * integers(generator, -3, 3, 2, 6, 8, 8), q=torch.zeros(2, 3, 6, dtype=torch.float64))
    half = torch.rand(2, 64, generator=generator).argsort(-1).view(2, 8, 8) % 2 == 0
    pixels = 5 * 7
    distinct = torch.stack([torch.randperm(pixels, generator=generator) for _ in range(2 * 12)])
    one = dict(x=distinct.double().view(2, 12, 5, 7) - 17, q=torch.zeros(2, 4, 12, dtype=torch.float64))
    for token in range(4):
        for head in range(2):
            one["q"][:, token, head * 6 + (token + head) % 6] = 1
    return [
        Sample(uniform, dict(num_heads=2, scale=1.0, return_logits=True)),
        Sample(one, dict(num_heads=2, scale=2048.0, return_logits=False)),
        Sample(uniform, dict(num_heads=2, scale=1.0, return_logits=True, mask=half)),
    ]


def native(sample: Sample) -> tuple:
    return (*sample.tensors.values(), *sample.others.values())

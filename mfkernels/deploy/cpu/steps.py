"""Define the steps of a plan, with the names and fields of the structs of csrc/cpu/engine/deployed_plan.h.

That file says what they mean.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

ACTIVATIONS = (
    *(None, "gelu", "hardswish", "relu", "relu6", "dynamic_relu", "scaled_relu6", "hardsigmoid"),
    *("silu", "sigmoid"),
)
GATINGS = ("ungated", "sigmoid_gate", "silu_gate")
SAME_PADDING = -1  # as many zeros as make a map's size that of the input divided by the stride
SIZES = {"image": -1, "twice": -2, "half": -3}  # of a resized map; else that of another one
RESAMPLINGS = ("nearest", "bilinear", "bilinear_by_two")
NORMS = ("group_norm", "response_norm", "response_norm_of_channels")


def margin(kernel: int, stride: int, padding: int) -> int:
    """Return what a side of a map grows by before a step with these fields divides it by the stride."""
    return stride - 1 if padding == SAME_PADDING else 2 * padding - kernel + stride


class Linear(NamedTuple):
    inputs: int
    outputs: int  # padded
    weight: int
    bias: int
    scale: int = 0
    zero: int = 0


class Header(NamedTuple):
    weights: int
    bf16: int
    narrow: int
    int8: int
    in_channels: int
    maps: int
    state: int
    features: int
    linears: int
    steps: int


class Layer(NamedTuple):
    activation: int
    linear: Linear


class Step(NamedTuple):
    kind: int
    words: int
    behind: int


class MapOut(NamedTuple):
    map: int
    channels: int
    sums: int = 0
    heads: int = 0
    tokens: int = 0
    row: int = 0
    scatter: int = -1
    gather: int = -1


class Conv(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    kernel: int
    stride: int
    padding: int
    groups: int
    activation: int
    linear: Linear


class Pointwise(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    affine: int
    affine_gelu: int
    added: int
    groups: int
    activation: int
    slopes: int
    attention: int
    tokens: int
    mixed: int
    linear: Linear


class Depthwise(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    kernel: int
    stride: int
    padding: int
    activation: int
    slopes: int
    attention: int
    tokens: int
    mixed: int
    taps: int
    bias: int


class Inverted(NamedTuple):
    out: MapOut
    input: int
    kernel: int
    taps: int
    bias: int
    expand: Linear
    project: Linear


class Attention(NamedTuple):
    out: MapOut
    input: int
    heads: int
    depth: int
    channels: int
    gating: int
    outside: int


class Windows(NamedTuple):
    out: MapOut
    input: int
    window: int


class Lite(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    stride: int
    residual: int
    hidden: int
    taps: int
    project: Linear


class Block(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    residual: int
    hidden: int
    taps: int
    slopes1: int
    slopes2: int
    attention: int
    tokens: int
    expand: Linear
    project: Linear


class Down(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    stride: int
    hidden1: int
    taps1: int
    slopes1: int
    hidden2: int
    taps2: int
    slopes2: int
    attention: int
    tokens: int
    project1: Linear
    project2: Linear


class Add(NamedTuple):
    out: MapOut
    input: int
    added: int
    maximum: int
    activation: int


class MaxPool(NamedTuple):
    out: MapOut
    input: int
    kernel: int
    stride: int
    padding: int


class MapNorm(NamedTuple):
    out: MapOut
    input: int
    gamma: int
    beta: int
    eps: int


class Weigh(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    stride: int
    heads: int
    tokens: int
    row: int
    queries: int


class Resize(NamedTuple):
    out: MapOut
    input: int
    like: int
    added: int
    resampling: int


class StateRows(NamedTuple):
    out: MapOut
    input: int
    source: int
    rows: int
    stride: int


class DynamicLite(NamedTuple):
    out: MapOut
    input: int
    in_channels: int
    hidden: int
    taps: int
    slopes: int
    project: Linear


class Spread(NamedTuple):
    out: MapOut
    input: int
    tokens: int
    values: int
    row: int
    positions: int
    weights: int
    bias: int


class Copy(NamedTuple):
    weights: int
    source: int
    floats: int
    target: int


class LinearStep(NamedTuple):
    rows: int
    source: int
    source_stride: int
    target: int
    target_stride: int
    activation: int
    added: int
    linear: Linear


class Norm(NamedTuple):
    rows: int
    width: int
    source: int
    target: int
    gamma: int
    eps: int


class Attend(NamedTuple):
    rows: int
    heads: int
    depth: int
    queries: int
    keys: int
    values: int
    stride: int
    target: int
    target_stride: int


class Combine(NamedTuple):
    tokens: int
    channels: int
    heads: int
    target: int


class Gate(NamedTuple):
    rows: int
    channels: int
    at: int
    at_stride: int
    gates: int
    stride: int


class Slopes(NamedTuple):
    rows: int
    source: int
    source_stride: int
    target: int
    functions: int
    linear: Linear


class Kernels(NamedTuple):
    token: int
    token_dim: int
    channels: int
    hidden: Linear
    scores: Linear
    softmax: int
    kernels: int
    target: int


class Mix(NamedTuple):
    attention: int
    kernels: int
    blocks: int
    source: int
    target: int
    matrix: int


class Affine(NamedTuple):
    norm: int
    channels: int
    gamma: int
    beta: int
    eps: int
    target: int


class Pool(NamedTuple):
    channels: int
    target: int


class Pooled(NamedTuple):
    input: int
    in_channels: int
    target: int
    slopes: int
    linear: Linear


class Collect(NamedTuple):
    input: int
    in_channels: int
    tokens: int
    target: int
    added: int
    positions: int
    weights: int
    bias: int


class Turn(NamedTuple):
    rows: int
    columns: int
    source: int
    source_stride: int
    target: int
    added: int


class HandOut(NamedTuple):
    map: int
    channels: int


KINDS: dict[str, Any] = {
    "image_conv": Conv,
    "dense_conv": Conv,
    "pointwise": Pointwise,
    "depthwise": Depthwise,
    "inverted": Inverted,
    "attention": Attention,
    "split": Windows,
    "join": Windows,
    "lite": Lite,
    "block": Block,
    "down": Down,
    "add": Add,
    "map_norm": MapNorm,
    "weigh": Weigh,
    "resize": Resize,
    "state_rows": StateRows,
    "dynamic_lite": DynamicLite,
    "spread": Spread,
    "max_pool": MaxPool,
    "copy": Copy,
    "linear": LinearStep,
    "norm": Norm,
    "attend": Attend,
    "combine": Combine,
    "gate": Gate,
    "slopes": Slopes,
    "kernels": Kernels,
    "mix": Mix,
    "affine": Affine,
    "pool": Pool,
    "pooled": Pooled,
    "collect": Collect,
    "turn": Turn,
    "hand_out": HandOut,
}  # in the order of C++'s


def numbers(fields: Any) -> Iterator[int]:
    """Return the numbers of a struct, those of the structs in it one after the other."""
    for field in fields:
        if isinstance(field, tuple):
            yield from numbers(field)
        else:
            yield int(field)


def parsed(plan: list[int]) -> tuple[Header, list[Layer], list[tuple[str, Any]]]:
    """Return the header, the linear layers, and each step's kind and fields, of a plan without its seal."""
    words = iter(plan)
    header = read(Header, words)
    layers = [read(Layer, words) for _ in range(header.linears)]
    made = []
    for _ in range(header.steps):
        kind = list(KINDS)[read(Step, words).kind]
        made.append((kind, read(KINDS[kind], words)))
    return header, layers, made


def read(kind: Any, words: Iterator[int]) -> Any:
    """Return the struct of these numbers, the inverse of `numbers`."""
    return kind(
        *(next(words) if field is int else read(field, words) for field in kind.__annotations__.values())
    )

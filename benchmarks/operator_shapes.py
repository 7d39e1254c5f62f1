"""What other people's networks call our operators with, as `layers` of tests/family_layers.py has ours."""

from collections.abc import Iterator

from family_layers import Layer


def elsewhere(batch: int) -> Iterator[tuple[str, Layer, bool]]:
    """Return the operator, its arguments and whether its maps are channels last."""
    for channels, side in ((160, 56), (320, 28), (640, 14), (1280, 7), (384, 56), (768, 28), (1536, 14)):
        # ConvNeXt V2 atto and tiny: maps are channels last. One of them pixel by pixel, too.
        norm = (_tensor(batch, channels, side, side), _tensor(channels), _tensor(channels), "channels", 1e-6)
        yield "global_response_norm", norm, True
    yield "global_response_norm", norm, False
    for channels, *size in (
        # DyReLU-B, two functions with intercepts, in a MobileNetV2 and in DyMN, in both memory formats.
        (32, 112, 112), (96, 56, 56), (144, 28, 28), (192, 14, 14), (576, 14, 14), (960, 7, 7),
        (64, 32, 250), (672, 8, 63),
    ):  # fmt: skip
        coefficients = _tensor(batch, 2, channels)
        relu = (_tensor(batch, channels, *size), coefficients, coefficients, None)
        yield "dynamic_relu", relu, False
        yield "dynamic_relu", relu, True
    for inputs, outputs, size, kernel, stride, kernels in (*_condconv(), *_dymn()):
        yield "dynamic_conv2d", _convolution(batch, inputs, outputs, size, kernel, stride, kernels), False
    for inputs, outputs, side, kernel, stride, groups in (
        # A ResNet-18 of dynamic convolutions with biases, and as a ResNeXt.
        (64, 64, 56, 3, 1, 1), (64, 128, 56, 3, 2, 1), (128, 128, 28, 3, 1, 1), (256, 256, 14, 3, 1, 1),
        (512, 512, 7, 3, 1, 1), (64, 128, 56, 1, 2, 1), (256, 512, 14, 1, 2, 1),
        (128, 128, 28, 3, 1, 4), (128, 128, 28, 3, 1, 32),
    ):  # fmt: skip
        layer = _convolution(batch, inputs, outputs, (side, side), kernel, stride, 4, groups, biased=True)
        yield "dynamic_conv2d", layer, False


def _condconv() -> Iterator[tuple]:
    """EfficientNet-CC-B0: its last stages have four or eight experts."""
    for kernels in (4, 8):
        yield 80, 480, (14, 14), 1, 1, kernels
        yield 480, 480, (14, 14), 5, 1, kernels
        yield 480, 112, (14, 14), 1, 1, kernels
        yield 672, 672, (14, 14), 5, 2, kernels
        yield 192, 1152, (7, 7), 1, 1, kernels
        yield 1152, 1152, (7, 7), 5, 1, kernels
        yield 1152, 1152, (7, 7), 3, 1, kernels
        yield 1152, 320, (7, 7), 1, 1, kernels


def _dymn() -> Iterator[tuple]:
    """EfficientAT's DyMN 10 on ten seconds of sound."""
    yield 16, 64, (64, 500), 1, 1, 4
    yield 64, 64, (64, 500), 3, 2, 4
    yield 72, 40, (16, 125), 1, 1, 4
    yield 72, 72, (32, 250), 5, 2, 4
    yield 120, 120, (16, 125), 5, 1, 4
    yield 40, 240, (16, 125), 1, 1, 4
    yield 480, 480, (8, 63), 3, 1, 4
    yield 672, 672, (8, 63), 5, 2, 4
    yield 160, 960, (4, 32), 1, 1, 4
    yield 960, 960, (4, 32), 5, 1, 4
    yield 960, 160, (4, 32), 1, 1, 4


def _convolution(
    batch: int, inputs: int, outputs: int, size: tuple[int, int], kernel: int, stride: int, kernels: int,
    groups: int | None = None, biased: bool = False,
) -> Layer:  # fmt: skip
    """By default depthwise where the kernel is larger than one pixel."""
    if groups is None:
        groups = 1 if kernel == 1 else inputs
    shape = (outputs, inputs // groups, kernel, kernel)
    biases = (_tensor(outputs), _tensor(kernels, outputs)) if biased else (None, None)
    tensors = (_tensor(batch, inputs, *size), _tensor(*shape), _tensor(kernels, *shape))
    settings = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups, 1.0)
    return *tensors, _tensor(batch, kernels), *biases, *settings


def _tensor(*shape: int) -> tuple:
    return ("tensor", *shape)

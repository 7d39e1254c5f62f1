"""Whole networks prepared for inference."""

import sys
from typing import Any

import torch
from torch import nn

from .. import _C, native
from ..acceleration.accelerate import as_ours
from ..acceleration.adopt import Unfit
from ..models.dynamic_mobile_former import DynamicMobileFormer
from ..models.end_to_end import EndToEndMobileFormer
from ..models.features import FeaturePyramid
from ..models.iformer import IFormer
from ..models.mobile_former import MobileFormer
from .cpu.dynamic_mobile_former import deployed_dynamic_mobile_former
from .cpu.end_to_end import deployed_end_to_end
from .cpu.iformer import deployed_iformer
from .cpu.int8 import Calibration, quantised
from .cpu.mobile_former import deployed_mobile_former
from .cpu.mobilenet import deployed_mobilenet, mobilenet_chain
from .cpu.packing import Formats
from .cpu.pyramid import Wanted
from .gpu.graph import deployed_on_gpu

__all__ = ["deploy"]


_FAMILIES: dict[type, Any] = {
    MobileFormer: deployed_mobile_former,
    DynamicMobileFormer: deployed_dynamic_mobile_former,
    IFormer: deployed_iformer,
}
_KNOWN = (*_FAMILIES, FeaturePyramid)


def deploy(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    calibration: Calibration | None = None,
) -> nn.Module:
    """Return a copy of `model` prepared for inference on its own device.

    On a CPU: batch norms folded, weights packed, each block one fused step. On a GPU: batch norms folded, and
    all kernels launched at once, by a CUDA graph; of a Mobile-Former in the form that is the fastest there:
    as it is; with depthwise convolutions and the activations around them in one kernel, and what blocks do
    with tokens alone in two, or where CUDA kernels are built in one; or in half precision with all of large
    maps' Mobile in one, too. Of a Dynamic Mobile-Former there are forms with each dynamic convolution in two
    kernels, one for its weights and one for itself and the activation after it; of it and of an iFormer also
    such with pointwise convolutions and what comes after them in one.

    Args:
        model: a network of `mfkernels.models`, of the released code as published, or timm's iFormer,
            `accelerate`d or not; on a CPU also a chain of convolutions and residual blocks, as MobileNets,
            EfficientNets and ResNets of torchvision and timm are, the end-to-end detector, and what
            `mfkernels.detection` and `mfkernels.segmentation` make, or its backbone with a feature pyramid
            network; in eval mode. It is left as it is; later changes of its weights do not reach the result.
        dtype: of weights and activations; torch.float32, or torch.bfloat16: on a GPU, or on processors that
            multiply it (AVX512-BF16); on a GPU torch.float16, too. Sums are float32 in each. On a GPU float32
            is computed without TF32, whatever PyTorch is set to: who can do with less takes bfloat16.
            torch.int8, on a CPU: products over maps multiply bytes, except in parts whose error is too large
            (see docs/int8.md); all else is float32, images and results, too. Numbers that are not finite do
            not pass.
        weights: how those of linear layers over tokens, means and features are stored, on a CPU and with
            float32; torch.bfloat16, or torch.int8, which has a factor for each output. They are rounded, all
            else is float32. A call for one image has less to read.
        calibration: of int8, images as the network will meet: a tensor (N, C, H, W), or batches, which may be
            the first of several tensors, as those of a data loader.

    Returns:
        A module that takes (B, C, H, W) images of any batch and size on the same device, in float32 or
        `dtype`, and returns what `model` does in their dtype, up to rounding. That of a detector takes and
        returns what the detector does, but for masks of images and `auxiliary`. It can be called from several
        threads, copied, pickled and exported, and has no gradients. On a CPU it runs on at most
        `torch.get_num_threads()` threads. On a GPU the first image of a shape (and of new strides) takes
        long: a graph is made for it, and the last 8 are kept; where none can be made, a warning says why and
        the network runs without.

    Raises:
        TypeError: no such network, a dtype that is not supported, or a `calibration` of another type.
        ValueError: `calibration` is missing, empty, given without int8, or leads to numbers that are not
            finite; `weights` is another dtype, or does not go with the device or with `dtype`; `model` is in
            train mode, has a part that deploy does not know, named, computes something else than its parts in
            a row where it is a chain, or is on several devices.
        RuntimeError: bfloat16, and this processor or the instruction set in use (MFKERNELS_ISA) cannot
            multiply it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"deploy: model must be an nn.Module, got {type(model).__name__}")
    on_gpu = _on_gpu(model)
    also = torch.float16 if on_gpu else torch.int8
    if dtype not in (torch.float32, torch.bfloat16, also):
        raise TypeError(f"deploy: dtype must be torch.float32, torch.bfloat16 or {also}, got {dtype}")
    _check_weights(weights, dtype, on_gpu)
    if (calibration is None) == (dtype == torch.int8):
        came = "none" if calibration is None else f"some and {dtype}"
        raise ValueError(
            f"deploy: calibration must be given with torch.int8 and with nothing else, got {came}"
        )
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"deploy: the model must be in eval mode (model.eval()), but {training[0]} is not")
    detectors = _detectors()
    if type(model) in detectors and on_gpu:
        raise ValueError(
            f"deploy: model must be on the CPU if it is a {type(model).__name__}; on a GPU its pyramid alone "
            "can be deployed"
        )
    known = (*_KNOWN, *detectors)
    chain = None
    if type(model) not in known:
        published = _published(model)
        chain = mobilenet_chain(model) if published is None and not on_gpu else None
        if published is None and chain is None:
            names = " or ".join(kind.__name__ for kind in _KNOWN)
            raise TypeError(f"deploy: model must be a {names}, got {type(model).__name__}")
        model = model if published is None else published
    if on_gpu:
        return deployed_on_gpu(model, dtype)
    if dtype == torch.bfloat16 and not _C.bf16_supported():
        raise RuntimeError(
            "deploy: bfloat16 needs a processor with avx512bf16 and an instruction set from avx512 on, "
            "or on Arm bf16 and the instruction set i8mm, but "
            f"{native.instruction_set()} is in use and the processor has {', '.join(_C.cpu_features())}"
        )

    def build(formats: Formats) -> Any:
        if chain is not None:
            return deployed_mobilenet(model, chain, formats)

        def run(pyramid: FeaturePyramid, wanted: Wanted) -> Any:
            return _FAMILIES[type(pyramid.network)](pyramid.network, formats, wanted)

        if type(model) in detectors:
            return detectors[type(model)](model, run)
        if isinstance(model, FeaturePyramid):
            return run(model, Wanted(model))
        return _FAMILIES[type(model)](model, formats)

    if calibration is None:
        return build(Formats(dtype, weights))
    if type(model) in detectors:
        raise TypeError(f"deploy: a {type(model).__name__} cannot be in torch.int8 yet, only in other dtypes")
    return quantised(lambda rounding: build(Formats(torch.float32, weights, rounding)), calibration)


def _detectors() -> dict[type, Any]:
    """Return what deploys each class of detectors; those that need torchvision, if they can be there."""
    found: dict[type, Any] = {EndToEndMobileFormer: deployed_end_to_end}
    if "mfkernels.fpn" in sys.modules:
        from .cpu.detectors import DETECTORS, deployed_detector

        found |= dict.fromkeys(DETECTORS, deployed_detector)
    return found


def _check_weights(weights: torch.dtype | None, dtype: torch.dtype, on_gpu: bool) -> None:
    if weights is None:
        return
    if weights not in (torch.bfloat16, torch.int8):
        raise ValueError(f"deploy: weights must be torch.bfloat16, torch.int8 or None, got {weights}")
    if on_gpu:
        raise ValueError(f"deploy: weights must be None for a model on a GPU, got {weights}")
    if dtype not in (torch.float32, torch.int8):
        raise ValueError(
            "deploy: weights must be None unless dtype is torch.float32 or torch.int8, "
            f"got {weights} and {dtype}"
        )


def _on_gpu(model: nn.Module) -> bool:
    devices = {str(value.device) for value in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"deploy: the model must be on one device, got {', '.join(sorted(devices))}")
    return any(device.startswith("cuda") for device in devices)


def _published(model: nn.Module) -> nn.Module | None:
    try:
        return as_ours(model)
    except Unfit as reason:
        raise TypeError(f"deploy: model is a {type(model).__name__}, but {reason}") from reason
